"""Predicted memory and work of a computation, found by running it on shapes alone."""

from __future__ import annotations

import itertools
import math
import os
import re
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastvideo_vae_core.errors import ConfigError
from fastvideo_vae_core.rehearsal import rehearsing

# What PyTorch's allocator on GPUs rounds every tensor up to.
_BLOCK = 512
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_META = torch.device("meta")

Item = TypeVar("Item")
Result = TypeVar("Result")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(size: int | str) -> int:
    """Bytes from a number or a string such as "6GiB", "500 MB" or "1.5GiB"."""
    if isinstance(size, int):
        return size
    text = size.replace(" ", "").upper()
    number = text.rstrip("BIGKM")
    try:
        return math.floor(float(number) * _UNITS[text[len(number) :] or "B"])
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"{size!r} is no size in bytes; write it like 6GiB or 500MB") from None


def format_bytes(size: int) -> str:
    """A size for people, in binary units; rounded up, so that who gives what it says as a budget gives enough."""
    for unit in ("GiB", "MiB", "KiB"):
        if size >= (scale := _UNITS[unit.upper()]):
            return f"{math.ceil(100 * size / scale) / 100:.2f} {unit}"
    return f"{size} B"


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a call will take.

    Attributes:
        peak: bytes of the device's memory at the worst moment.
        work: multiplications of convolutions, linear maps and attention.
        uploaded, downloaded: bytes of grids that come from the host, and that go there.
        steps: what was seen of each step, where there are any (`tiling.Passed`).
    """

    peak: int
    work: float = 0.0
    uploaded: float = 0.0
    downloaded: float = 0.0
    steps: Sequence[Any] = ()

    def __add__(self, size: int) -> Forecast:
        """The same beside something else that is there all the time."""
        return replace(self, peak=self.peak + size)


def matrix_workspace(device: torch.device) -> int:
    """Bytes that cuBLAS is given of a GPU's memory as long as the process lives, from its first matrix product on.

    PyTorch takes them from its own allocator, for each thread and stream that multiplies matrices
    (`getChosenWorkspaceSize` in `aten/src/ATen/cuda/CublasHandlePool.cpp`). Here one thread does, on one stream.
    Where there is no GPU to ask it is that of a Hopper; Blackwells get as much from newer versions of PyTorch only.
    """
    if device.type != "cuda":
        return 0
    if torch.cuda.is_available():
        if (chosen := getattr(torch.backends.cuda, "cublas_workspace_size", None)) is not None:
            return int(chosen())
        recent = torch.cuda.get_device_capability(device) >= (9, 0)
    else:
        recent = True
    if parts := re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")):
        return sum(int(size) * int(count) for size, count in parts) << 10
    return 32 << 20 if recent else (2 * 4096 + 8 * 16) << 10


def forecast(
    run: Callable[[Tensor], Any],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device = _META,
    weights: Iterable[Tensor] = (),
    recalled: Recalled | None = None,
) -> Forecast:
    """What `run` will take, which must live on the meta device; its input and result count.

    device: that of the call, whose kernels and layouts count.
    weights: what is there before; neither they nor views of them count.
    recalled: from rehearsals before this one, with the same weights and the same parts.

    Attention counts as one kernel that keeps no matrix of scores, which holds for the fused kernels of GPUs and CPUs.
    Workspaces that convolution libraries take for themselves are not counted.
    """
    seen = Rehearsal(device, weights, recalled)
    before = _UNDER_WAY.set(seen)
    try:
        with rehearsing(device), seen, seen.attending, torch.no_grad():
            # Made inside, so that it counts.
            run(torch.empty(tuple(shape), dtype=dtype, device="meta"))
    finally:
        _UNDER_WAY.reset(before)
    return Forecast(
        peak=seen.peak, work=seen.work, uploaded=seen.uploaded, downloaded=seen.downloaded, steps=seen.steps
    )


def predicted_peak(run: Callable[[Tensor], Any], shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of tensors that are alive at the worst moment of `run`; see `forecast`."""
    return forecast(run, shape, dtype).peak


def rehearsal() -> Rehearsal | None:
    """The one that is under way."""
    return _UNDER_WAY.get()


@contextmanager
def elsewhere() -> Iterator[None]:
    """Within it, what a rehearsal makes lies in another memory than that of its device, and does not count."""
    seen = rehearsal()
    if seen is None:
        yield
        return
    counts, seen.counts = seen.counts, False
    try:
        yield
    finally:
        seen.counts = counts


def excerpt(items: Iterable[Item], kind: Callable[[Item], Hashable]) -> list[tuple[Item, int]]:
    """Items, and for how many each stands. In a rehearsal the first and the last of each kind tell the memory of all;
    the last one stands for the rest, and others for none. Elsewhere each stands for itself."""
    items = list(items)
    if rehearsal() is None:
        return [(item, 1) for item in items]
    kinds = [kind(item) for item in items]
    total, met, found = Counter(kinds), Counter[Hashable](), []
    for item, each in zip(items, kinds, strict=True):
        met[each] += 1
        found.append((item, int(met[each] == 1) if met[each] < total[each] else max(total[each] - 1, 1)))
    return found


def until_steady(
    items: Sequence[Item], kind: Callable[[Item], Hashable], state: Callable[[], Hashable]
) -> Iterator[tuple[Item, int]]:
    """Items that are done one behind the other, and for how many each stands. In a rehearsal, where one has left the
    state as it found it, the next of its kind stands for all of them that follow. Elsewhere each stands for itself."""
    if rehearsal() is None:
        yield from ((item, 1) for item in items)
        return
    for _, group in itertools.groupby(items, kind):
        left, before = list(group), None
        while left:
            now = state()
            times = len(left) if now == before else 1
            yield left[0], times
            left, before = left[times:], now


@contextmanager
def repeating(parts: Sequence[object]) -> Iterator[None]:
    """Within it, these parts of a computation are run again and again, see `rehearsed_once`. A rehearsal takes them for
    those that had the same places in the ones before."""
    seen = rehearsal()
    if seen is None:
        yield
        return
    seen.begin(parts)
    # It costs whatever is done a third more time, and what is done between the parts attends to nothing.
    seen.attending.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        seen.attending.__enter__()  # type: ignore[no-untyped-call]
        seen.begin(())


def rehearsed_once(
    part: object, run: Callable[..., Result], given: Sequence[Tensor], *how: Hashable, remembers: bool = False
) -> Result:
    """run(*how), where all that it does follows from the part, how it is run, and what it is given.

    A rehearsal knows from the first time what that takes for tensors of one layout. Where a run leaves something for
    those behind it, such as folded weights, what it takes depends on whether that is there: such a part is run until it
    is. And one is always run that lets go what it is given, which may be there nevertheless.

    remembers: it also follows from runs before it, and is always run.
    """
    seen = rehearsal()
    place = None if seen is None else seen.places.get(id(part))
    if seen is None or place is None:
        return run(*how)
    return seen.once(place, run, given, how, remembers)


class _Copy(NamedTuple):
    """How a tensor lay in new memory, for so many numbers, or in that of one that was given."""

    given: int | None
    numbers: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int

    def again(self, given: Sequence[Tensor]) -> Tensor:
        base = torch.empty(self.numbers, dtype=self.dtype, device="meta") if self.given is None else given[self.given]
        return base.as_strided(self.shape, self.strides, int(base.storage_offset()) + self.offset)


@contextmanager
def standing_for(times: int) -> Iterator[None]:
    """Within it, what a rehearsal does counts so often."""
    seen = rehearsal()
    if seen is None:
        yield
        return
    before, seen.times = seen.times, seen.times * times
    try:
        yield
    finally:
        seen.times = before


# Of storages that were given, whose they were and where it began.
_Owners = Mapping[int, tuple[int, int]]


class _Took(NamedTuple):
    """What a run took: bytes beside those that were there before, multiplications, and what it made, with a `_Copy` for
    each tensor but weights."""

    peak: int
    work: float
    made: Any


class Recalled:
    """What rehearsals found out about the parts of one network, for those that follow.

    Attributes:
        took: by the place of the part, how it was run, and the layout of what it was given.
        leaving: places of parts that leave more than their results.
    """

    def __init__(self) -> None:
        self.took: dict[Hashable, _Took] = {}
        self.leaving: set[int] = set()


class Rehearsal(TorchDispatchMode):
    """Sums the storages that are alive, as operations make them and Python drops them, and the multiplications.

    Attributes:
        counts: whether what is made lies in the device's memory.
        times: for how many alike the operation stands that is being done.
        steps: see `Forecast`.
        places: of the parts that are run again and again, by identity.
        attending: within it, attention is taken for a fused kernel.
    """

    def __init__(self, device: torch.device, weights: Iterable[Tensor], recalled: Recalled | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self._since = 0
        self.work = self.uploaded = self.downloaded = 0.0
        self.counts, self.times = True, 1
        self.steps: Sequence[Any] = ()
        self._on_gpu = device.type == "cuda"
        self.places: Mapping[int, int] = {}
        self.attending = _FusedAttention(self)
        self._recalled = Recalled() if recalled is None else recalled
        # Of each storage the how manieth it is, 0 for weights; and the oldest that has gone in a run.
        self._ages = {each.untyped_storage()._cdata: 0 for each in weights}
        self._age = self._gone = 0
        # Parts that have left all that they leave, and which of them left a storage.
        self._ready, self._left_by = set[int](), dict[int, int]()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to keep its compiler out, PyTorch would go through it for every operation, in a third of all time."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        # Operations have a hash that takes longer than to look it up.
        if (multiplications := _WORK.get(id(func))) is not None:
            self.work += self.times * multiplications(result, *args)
        if self._on_gpu and func is _CONVOLUTION:
            result = self._laid_out(result, args[0], args[1])
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def begin(self, parts: Sequence[object]) -> None:
        """Other parts are run again and again from here on, which have left nothing yet."""
        self.places = {id(part): place for place, part in enumerate(parts)}
        self._ready.clear()
        self._left_by.clear()

    def once(
        self,
        place: int,
        run: Callable[..., Result],
        given: Sequence[Tensor],
        how: tuple[Hashable, ...],
        remembers: bool,
    ) -> Result:
        """See `rehearsed_once`."""
        recalled = self._recalled
        key = (place, how, *((each.shape, each.stride()) for each in given))
        took = recalled.took.get(key) if place in self._ready or place not in recalled.leaving else None
        if took is not None and not remembers:
            self._reached(self.live + took.peak)
            self.work += self.times * took.work
            again: Result = tree_map_only(_Copy, lambda each: each.again(given), took.made, _is_copy)
            return again
        storages = (each.untyped_storage()._cdata for each in given)
        owners = {each: (index, int(given[index].storage_offset())) for index, each in enumerate(storages)}
        count, live, work, since, times, begun = len(given), self.live, self.work, self._since, self.times, self._age
        self._since, self.times, self._gone = live, 1, begun + 1
        with self.attending:
            made = run(*how)
        peak, work = self._since - live, self.work - work
        self._since, self.times, self.work = max(since, self._since), times, self.work + (times - 1) * work
        tensors = [each for each in tree_leaves(made) if isinstance(each, Tensor)]
        results = {each.untyped_storage()._cdata for each in tensors}
        left = [age for storage, age in self._ages.items() if age > begun and storage not in results]
        self._ready.add(place)
        self._left_by.update(dict.fromkeys(left, place))
        if left or self._gone <= begun:
            recalled.leaving.add(place)
        elif not remembers and len(given) == count and self._can_copy(tensors, owners, begun):
            recalled.took[key] = _Took(peak, work, tree_map_only(Tensor, lambda x: self._copied(x, owners), made))
        return made

    def _can_copy(self, made: Sequence[Tensor], owners: _Owners, begun: int) -> bool:
        """Whether the results of a run are weights, parts of what it was given, or new, each with memory of its own."""
        storages = [each.untyped_storage()._cdata for each in made]
        ages = {each: self._ages.get(each, -1) for each in storages}
        new = [each for each in storages if ages[each] > begun]
        return len(new) == len(set(new)) and all(age > begun or age == 0 or at in owners for at, age in ages.items())

    def _copied(self, x: Tensor, owners: _Owners) -> Tensor | _Copy:
        storage = x.untyped_storage()
        if self._ages.get(storage._cdata) == 0:
            return x
        index, offset = owners.get(storage._cdata, (None, 0))
        numbers = storage.nbytes() // x.element_size()
        return _Copy(index, numbers, x.dtype, x.shape, x.stride(), int(x.storage_offset()) - offset)

    def since(self) -> int:
        """The peak since this was asked last."""
        found, self._since = self._since, self.live
        return found

    def _reached(self, live: int) -> None:
        self._since = max(self._since, live)
        self.peak = max(self.peak, live)

    def _laid_out(self, made: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """What a convolution makes, in the layout that it has on a GPU: channels-last if either operand is. The other
        is copied into that layout, for as long as the convolution runs; the meta device knows nothing of it."""
        layout = _CHANNELS_LAST.get(x.ndim)
        if layout is None or not any(_is_channels_last(each, layout) for each in (x, weight)):
            return made
        copies = sum(each.nbytes for each in (x, weight) if not each.is_contiguous(memory_format=layout))
        self._reached(self.live + copies + made.nbytes)
        return torch.empty_like(made, memory_format=layout)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._ages:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK if self.counts else 0
        self._age += 1
        self._ages[key] = self._age
        self.live += size
        self._reached(self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        age = self._ages.pop(key)
        self._gone = min(self._gone, age)
        self._ready.discard(self._left_by.pop(age, -1))
        self.live -= size


def _is_copy(x: object) -> bool:
    return isinstance(x, _Copy)


def _is_channels_last(x: Tensor, layout: torch.memory_format) -> bool:
    """Whether a convolution takes it for channels-last, by its strides: a part of a grid, with gaps, is so too, and is
    copied; what has both layouts because an axis has one element may be either."""
    channels = x.shape[1]
    if channels == 1:
        return x.is_contiguous(memory_format=layout) and not x.is_contiguous()
    return x.stride(1) == 1 and all(x.stride(axis) >= channels for axis in range(2, x.ndim))


def _convolving(made: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    transposed = rest[4]
    return (x if transposed else made).numel() * weight[0].numel()


_UNDER_WAY: ContextVar[Rehearsal | None] = ContextVar("rehearsal", default=None)

_CONVOLUTION = torch.ops.aten.convolution.default
_WORK: dict[int, Callable[..., int]] = {
    id(_CONVOLUTION): _convolving,
    id(torch.ops.aten.mm.default): lambda made, x, _: made.numel() * x.shape[-1],
    id(torch.ops.aten.bmm.default): lambda made, x, _: made.numel() * x.shape[-1],
    id(torch.ops.aten.addmm.default): lambda made, _, x, *rest: made.numel() * x.shape[-1],
}


class _FusedAttention(TorchFunctionMode):
    """On the meta device attention would fall back to the formula with the whole matrix of scores."""

    def __init__(self, seen: Rehearsal) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            queries, keys = args[:2]
            self._seen.work += self._seen.times * 2 * queries.numel() * keys.shape[-2]
            return torch.empty_like(queries)
        return func(*args, **(kwargs or {}))
