"""Predicted peak memory of a computation, found by running it on shapes alone."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from fastvideo_vae_core.errors import ConfigError
from fastvideo_vae_core.rehearsal import rehearsing

# What PyTorch's allocator on GPUs rounds every tensor up to.
_BLOCK = 512
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_META = torch.device("meta")
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


def predicted_peak(
    run: Callable[[Tensor], Any],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device = _META,
    weights: Iterable[Tensor] = (),
) -> int:
    """Bytes of tensors that are alive at the worst moment of `run`, its input and result among them.

    `run` must live on the meta device.

    device: that of the call, whose kernels and layouts count.
    weights: what is there before; neither they nor views of them count.

    Attention counts as one kernel that keeps no matrix of scores, which holds for the fused kernels of GPUs and CPUs.
    Workspaces that convolution libraries take for themselves are not counted.
    """
    live = _LiveBytes(device, weights)
    with rehearsing(device), live, _FusedAttention(), torch.no_grad():
        # Made inside, so that it counts.
        run(torch.empty(tuple(shape), dtype=dtype, device="meta"))
    return live.peak


@contextmanager
def elsewhere() -> Iterator[None]:
    """Within it, what a rehearsal makes lies in another memory than that of its device, and does not count."""
    mode = _get_current_dispatch_mode()
    if not isinstance(mode, _LiveBytes):
        yield
        return
    counts, mode.counts = mode.counts, False
    try:
        yield
    finally:
        mode.counts = counts


class _LiveBytes(TorchDispatchMode):
    """Sums the storages that are alive, as operations make them and Python drops them."""

    def __init__(self, device: torch.device, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.counts = True
        self._on_gpu = device.type == "cuda"
        self._known = {each.untyped_storage()._cdata for each in weights}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._on_gpu and func is torch.ops.aten.convolution.default:
            result = self._laid_out(result, args[0], args[1])
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _laid_out(self, made: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """What a convolution makes, in the layout that it has on a GPU: channels-last if either operand is. The other
        is copied into that layout, for as long as the convolution runs; the meta device knows nothing of it."""
        layout = _CHANNELS_LAST.get(x.ndim)
        if layout is None or not any(_is_channels_last(each, layout) for each in (x, weight)):
            return made
        copies = sum(each.nbytes for each in (x, weight) if not each.is_contiguous(memory_format=layout))
        self.peak = max(self.peak, self.live + copies + made.nbytes)
        return torch.empty_like(made, memory_format=layout)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK if self.counts else 0
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _is_channels_last(x: Tensor, layout: torch.memory_format) -> bool:
    """Whether a convolution takes it for channels-last: not where both layouts are one."""
    return x.is_contiguous(memory_format=layout) and not x.is_contiguous()


class _FusedAttention(TorchFunctionMode):
    """On the meta device attention would fall back to the formula with the whole matrix of scores."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))
