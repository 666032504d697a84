"""Where the grids between the steps of a network are, and how a step gets the parts of them that a tile is made from.

A grid is one tensor on the device; or it is in slabs, which go one by one as their last reader passes, so that the next
grid takes their place, and of which a share may be on the host, from where it comes and where it goes while others are
being computed; or it is nowhere: then each reader computes the part that it needs anew, from what the grid would have
been made from.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastvideo_vae_core.memory import elsewhere, rehearsal, rehearsed_once
from fastvideo_vae_core.ops.norm import Moments
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.ops.words import copy_rows, write_rows
from fastvideo_vae_core.transfers import transfer

if TYPE_CHECKING:
    from fastvideo_vae_core.tiling import Step

Place = Literal["device", "slabs", "anew"]

# Elements [start, stop) of an axis, and of each axis behind (B, C).
Span = tuple[int, int]
Region = tuple[Span, ...]

# By the number of axes: channels innermost; and all axes, in their own order and so.
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_ORDERS = {axes: (tuple(range(axes)), (0, *range(2, axes), 1)) for axes in range(2, 8)}


@dataclass(eq=False, kw_only=True)
class Grid:
    """What a step reads.

    Attributes:
        index: grids are made from those with smaller ones.
        sizes: of the whole grid along each axis behind (B, C).
    """

    index: int
    sizes: tuple[int, ...]


@dataclass(eq=False, kw_only=True)
class Held(Grid):
    """A grid in one tensor on the device.

    Attributes:
        data: (B, C, ...), or the part of it that is here.
        begin: where that part begins along each axis behind (B, C).
    """

    data: Tensor
    begin: tuple[int, ...]


class Slab(NamedTuple):
    """The elements `span` of the axis along which a grid is cut; `host` is the memory of the host that they lie in,
    None for those on the device."""

    span: Span
    data: Tensor
    host: Tensor | None = None

    @property
    def on_host(self) -> bool:
        """Whether it has to be brought before it is read."""
        return self.host is not None


@dataclass(eq=False, kw_only=True)
class Slabs(Grid):
    """A grid in slabs along one axis.

    Attributes:
        axis: of a tensor (B, C, ...).
        entire: every slab is on the host or on the device as a whole, because tiles have no halo; else a share of each
            is on the host, so that there is as much to copy beside each tile.
        slabs: those that are still needed.
    """

    axis: int
    entire: bool = False
    slabs: list[Slab] = field(default_factory=list)


@dataclass(eq=False, kw_only=True)
class Anew(Grid):
    """A grid that is nowhere, but can be computed wherever it is read.

    Attributes:
        step, reads, moments: how it is made, from what, and by which statistics.
    """

    step: Step
    reads: tuple[Grid, ...]
    moments: Moments | None


# What is made and not wanted yet, and its like for rehearsals, beside what a step itself remembers.
_WAITING, _LIKE = "waiting", "like"

# What the steps of a pass keep of the tiles behind them, by the grid that they make anew; None: the one that is wanted.
Memories = dict[Grid | None, dict[Any, Any]]


class Courier:
    """Brings crops from the host to the device and tiles from the device to the host, beside what is being computed.

    On a GPU there is a stream for each way and pinned memory. All that a stream touches on the device belongs to the
    stream that computes, and each waits for the other before it reuses memory, so what is there at a time does not
    depend on who is faster: a crop that is used and one that is coming, a tile that is being made and one that leaves.
    Pinned memory is reused in the same way: PyTorch gives it again only when the GPU is through with it, which a CPU
    that runs ahead never sees, and pinning more takes tens of milliseconds each time.
    Elsewhere copies are done at once.
    """

    def __init__(self, device: torch.device, real: bool) -> None:
        # Crops come one tile ahead; so they do in a rehearsal.
        self.ahead = device.type == "cuda"
        self._device = device
        self._asynchronous = self.ahead and real
        # Made when the host is used first: a call that is recorded as a graph must not wait for streams of its own.
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._computes: torch.cuda.Stream | None = None
        self._leaving = deque[tuple[torch.cuda.Event | None, list[Tensor]]]()
        # Of the host's memory what no slab is in, by its size.
        self._free = defaultdict[int, list[Tensor]](list)
        # Slabs that have come or are coming as a whole, by the identity of their memory on the host.
        self._near = dict[int, tuple[Tensor, torch.cuda.Event | None]]()

    def __enter__(self) -> Courier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()

    def bring(self, grid: Slabs, region: Region) -> Callable[[], Tensor]:
        """Begin to put together a part of a grid; the result waits for what comes from the host."""
        first, last = region[grid.axis - 2]
        needed = [slab for slab in grid.slabs if slab.span[0] < last and slab.span[1] > first]
        if len(needed) == 1 and not needed[0].on_host:
            part = _part_of(needed[0], grid.axis, region)
            self._expect(grid, last)
            return lambda: part
        if len(needed) == 1 and grid.entire:
            return self._bring_entire(needed[0], grid.axis, region)
        slab = needed[0].data
        shape = (*slab.shape[:2], *(stop - start for start, stop in region))
        device = self._device if self._asynchronous else slab.device
        made = torch.empty(shape, dtype=slab.dtype, device=device, memory_format=layout_of(slab))
        for slab_ in needed:
            start, stop = max(slab_.span[0], first), min(slab_.span[1], last)
            inner = [*region]
            inner[grid.axis - 2] = (start, stop)
            source, into = _part_of(slab_, grid.axis, inner), made.narrow(grid.axis, start - first, stop - start)
            if slab_.on_host:
                _count_uploaded(into)
                self._upload(into, source)
            else:
                move(into, source)
        comes = self._asynchronous and any(slab_.on_host for slab_ in needed)
        return self._once_there(made, self._ways()[0].record_event() if comes else None)

    def _bring_entire(self, slab: Slab, axis: int, region: Region) -> Callable[[], Tensor]:
        """A part of a slab on the host, all of which comes."""
        if id(slab.host) not in self._near:
            self._begin(slab)
        whole, event = self._near[id(slab.host)]
        if region[axis - 2][1] >= slab.span[1]:
            del self._near[id(slab.host)]
        part = _part_of(slab._replace(data=whole), axis, region)
        _count_uploaded(part)
        return self._once_there(part, event)

    def _once_there(self, part: Tensor, event: torch.cuda.Event | None) -> Callable[[], Tensor]:
        """What gives a part, behind the event on the stream that computes."""

        def arrived() -> Tensor:
            if event is not None:
                self._main().wait_event(event)
            return part

        return arrived

    def _expect(self, grid: Slabs, behind: int) -> None:
        """Begin to bring the next slab on the host, beside tiles that need none: one at a time."""
        if not grid.entire or not self.ahead:
            return
        slab = next((slab for slab in grid.slabs if slab.on_host and slab.span[0] >= behind), None)
        if slab is not None and id(slab.host) not in self._near:
            self._begin(slab)

    def _begin(self, slab: Slab) -> None:
        device = self._device if self._asynchronous else slab.data.device
        made = torch.empty(slab.data.shape, dtype=slab.data.dtype, device=device, memory_format=layout_of(slab.data))
        self._upload(made, slab.data)
        self._near[id(slab.host)] = made, self._ways()[0].record_event() if self._asynchronous else None

    def store(self, piece: Tensor, grid: Slabs, region: Region, span: Span, host_share: float) -> None:
        """Keep a tile of a grid, in the slab `span` of its axis: a share of it on the host, the rest on the device."""
        start, stop = span
        edge = stop - math.ceil((stop - start) * host_share)
        if edge == stop and piece.shape[2:] == (
            *grid.sizes[: grid.axis - 2],
            stop - start,
            *grid.sizes[grid.axis - 1 :],
        ):
            # A tile of whole rows is the slab, unless it is a part of something larger.
            piece = dense(piece)
            if piece.untyped_storage().nbytes() == piece.nbytes:
                grid.slabs.append(Slab(span, piece))
                return
        if not any(slab.span[0] == start for slab in grid.slabs):
            for part, on_host in (((start, edge), False), ((edge, stop), True)):
                if part[0] < part[1]:
                    grid.slabs.append(self._room(piece, grid, part, on_host))
        leaving: list[Tensor] = []
        for slab in grid.slabs:
            if start <= slab.span[0] < stop:
                inner = [*region]
                inner[grid.axis - 2] = slab.span
                into = _part_of(slab, grid.axis, inner)
                source = piece.narrow(grid.axis, slab.span[0] - start, slab.span[1] - slab.span[0])
                if slab.on_host:
                    leaving.append(self._download(into, source))
                else:
                    move(into, source)
        if leaving and self.ahead:
            event = self._ways()[1].record_event() if self._asynchronous else None
            self._leaving.append((event, leaving))
            self.let_go(all_but=1)

    def release(self, grid: Slabs, before: int) -> None:
        """Let go of what lies in front of this element of a grid, which no tile that is still to be begun needs.

        What is stored next may take its memory on the host: it leaves behind all that the stream that computes has
        waited for, and the last crop from there is among it.
        """
        for slab in grid.slabs:
            if slab.span[1] <= before and slab.host is not None:
                # A rehearsal leaves out tiles.
                self._near.pop(id(slab.host), None)
                self._free[slab.host.nbytes].append(slab.host)
        grid.slabs[:] = [slab for slab in grid.slabs if slab.span[1] > before]

    def _room(self, piece: Tensor, grid: Slabs, span: Span, on_host: bool) -> Slab:
        sizes = list(grid.sizes)
        sizes[grid.axis - 2] = span[1] - span[0]
        shape, layout = (*piece.shape[:2], *sizes), layout_of(piece)
        if not on_host:
            return Slab(span, torch.empty(shape, dtype=piece.dtype, device=piece.device, memory_format=layout))
        with elsewhere():
            like = torch.empty(shape, dtype=piece.dtype, device="meta", memory_format=layout)
            if piece.is_meta:
                return Slab(span, like, like)
            # PyTorch would round pinned memory up to a power of two.
            size = 1 << (like.nbytes - 1).bit_length()
            free = self._free[size]
            host = free.pop() if free else self._pinned(size)
            data = host.view(piece.dtype).as_strided(shape, like.stride())
        return Slab(span, data, host)

    def _pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._asynchronous)

    def _upload(self, into: Tensor, source: Tensor) -> None:
        if not self._asynchronous:
            move(into, source)
            return
        stream, _ = self._ways()
        # The memory may have been in use before.
        stream.wait_stream(self._main())
        with torch.cuda.stream(stream):
            transfer(_in_memory(into), _in_memory(source))

    def _download(self, into: Tensor, source: Tensor) -> Tensor:
        """Begin to copy to the host; what is given back must stay until it is done."""
        if (seen := rehearsal()) is not None:
            seen.downloaded += seen.times * source.nbytes
        if not self._asynchronous:
            move(into, source)
            return source
        _, stream = self._ways()
        if _order(source) != _order(into):
            source = source.contiguous(memory_format=layout_of(into))
        stream.wait_stream(self._main())
        with torch.cuda.stream(stream):
            transfer(_in_memory(into), _in_memory(source))
        return source

    def turn(self) -> None:
        """Behind a step: what comes from the host next may be what went there last. What leaves may go on leaving."""
        self._near.clear()
        if self._streams is not None:
            self._streams[0].wait_stream(self._streams[1])

    def let_go(self, all_but: int = 0) -> None:
        """Wait, on the stream that computes, until tiles have left, and release them."""
        while len(self._leaving) > all_but:
            event, _ = self._leaving.popleft()
            if event is not None:
                self._main().wait_event(event)

    def settle(self) -> None:
        """Wait, on the stream that computes, until everything that is under way has arrived."""
        self.turn()
        self.let_go()
        if self._streams is not None:
            for stream in self._streams:
                self._main().wait_stream(stream)

    def _ways(self) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """The streams from the host and to it."""
        if self._streams is None:
            self._streams = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)
        return self._streams

    def _main(self) -> torch.cuda.Stream:
        """The stream that computes."""
        if self._computes is None:
            self._computes = torch.cuda.current_stream(self._device)
        return self._computes


@dataclass(frozen=True, eq=False)
class Making:
    """A region of what a step makes.

    Attributes:
        memories: of regions that follow one another and are made without a halo; None: it is made by itself.
    """

    step: Step
    reads: tuple[Grid, ...]
    moments: Moments | None
    region: Region
    memories: Memories | None = None

    @cached_property
    def crop(self) -> Region:
        """The elements of the grids that it is made from, beyond those that are remembered."""
        axes = zip(self.step.axes, self.region, self.reads[0].sizes, strict=True)
        crop = tuple(axis.needs(*span, size) for axis, span, size in axes)
        if self.memories is None:
            return crop
        onward = self.step.axes[0].continues(*self.region[0], self.reads[0].sizes[0])
        assert onward is not None
        return onward, *crop[1:]

    @cached_property
    def inner(self) -> tuple[bool, ...]:
        """Along which axes those go on by the whole halo at both ends, so that nothing has to be padded."""
        if not self.step.trims or self.memories is not None:
            return (False,) * len(self.region)
        axes = zip(self.step.axes, self.region, self.crop, strict=True)
        return tuple(
            axis.down == 1
            and start - axis.position(first) == axis.before * axis.up > 0
            and last * axis.up - axis.lead - stop == axis.after * axis.up
            for axis, (start, stop), (first, last) in axes
        )

    def run(self, crops: list[Tensor], grid: Grid | None = None) -> Tensor | Sum:
        """The region, from these elements, which the step may let go; what their borders spoiled is cut off.

        grid: the one that the region is a part of, if it is made anew.
        """
        if self.memories is not None:
            return self._onward(crops, self.memories.setdefault(grid, {}))
        more = (self.inner,) if any(self.inner) else ()
        made = rehearsed_once(self.step, partial(self.step.run, crops, self.moments), crops, *more)
        sizes = (made if isinstance(made, Tensor) else made.x).shape[2:]
        keep = []
        for axis, size, (start, stop), (first, _) in zip(self.step.axes, sizes, self.region, self.crop, strict=True):
            skip = 0 if size == stop - start else start - axis.position(first)
            keep.append(slice(skip, skip + stop - start))
        inside = (slice(None), slice(None), *keep)
        if isinstance(made, Tensor):
            return made[inside]
        return Sum(made.x[inside], None if made.branch is None else made.branch[inside], made.bias)

    def _onward(self, crops: list[Tensor], memory: dict[Any, Any]) -> Tensor | Sum:
        """The region, behind those before it. Elements that become several are not cut: what is beyond the region waits
        for the next one."""
        (start, stop), (first, last) = self.region[0], self.crop[0]
        run = partial(self.step.run, crops, self.moments, **({"memory": memory} if self.step.passes else {}))
        if self.step.axes[0].up == 1:
            return rehearsed_once(self.step, run, crops, remembers=self.step.passes)
        # By where it begins, because a rehearsal leaves out tiles.
        parts = [each for begin, each in memory.pop(_WAITING, ()) if begin == start]
        if first < last:
            parts.append(dense(rehearsed_once(self.step, run, crops, remembers=self.step.passes)))
            like = parts[-1]
            memory[_LIKE] = partial(
                torch.empty, like.shape, dtype=like.dtype, device="meta", memory_format=layout_of(like)
            )
        elif not parts:
            return memory[_LIKE]()[:, :, : stop - start]
        made = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
        if made.shape[2] > stop - start:
            memory[_WAITING] = [(stop, made[:, :, stop - start :])]
        return made[:, :, : stop - start]

    @cached_property
    def needs(self) -> tuple[list[tuple[Grid, Making]], dict[Grid, Region]]:
        """What has to be made before, last to first, each with the grid that it is a part of; and which part of each
        grid is wanted. Of a grid there is one part, however many read it on the way."""
        # It itself is not among them: in a circle of references grids would stay until they are collected.
        makings = list[tuple[Grid, Making]]()
        wanted = dict[Grid, Region]()
        _ask(self, wanted)
        met = set[Grid]()
        while grids := [grid for grid in wanted if isinstance(grid, Anew) and grid not in met]:
            # All that read it have asked when it is the last one.
            grid = max(grids, key=lambda each: each.index)
            met.add(grid)
            inner = Making(grid.step, grid.reads, grid.moments, wanted[grid], self.memories)
            _ask(inner, wanted)
            makings.append((grid, inner))
        return makings, wanted


def follow(step: Step, reads: Sequence[Grid], areas: Sequence[Region]) -> bool:
    """Whether these regions of what a step makes can follow one another: they are cut along the first axis alone, and
    the step, and all that is made anew for it, remembers what is behind it there."""
    if len(areas) < 2:
        return False
    sizes = [axis.output_size(size) for axis, size in zip(step.axes, reads[0].sizes, strict=True)]
    if areas[0][0][0] or any(region[1:] != tuple((0, size) for size in sizes[1:]) for region in areas):
        return False
    left: list[tuple[Step, Sequence[Grid], Sequence[Span]]] = [(step, reads, [region[0] for region in areas])]
    while left:
        step, reads, spans = left.pop()
        axis = step.axes[0]
        if axis.whole or not (step.passes or axis.before == axis.after == axis.lead == 0):
            return False
        found = [axis.continues(*span, reads[0].sizes[0]) for span in spans]
        onward = [span for span in found if span is not None]
        if len(onward) < len(found):
            return False
        left += [(grid.step, grid.reads, onward) for grid in reads if isinstance(grid, Anew)]
    return True


def kind_of(making: Making) -> Hashable:
    """What two regions have in common whose making takes the same memory."""
    sizes = tuple(last - first for first, last in making.crop)
    if making.memories is None:
        return sizes
    _, wanted = making.needs
    kinds = list[Hashable]()
    for grid, region in wanted.items():
        kinds.append(tuple(last - first for first, last in region))
        if isinstance(grid, Slabs):
            first, last = region[grid.axis - 2]
            kinds += [slab.on_host for slab in grid.slabs if slab.span[0] < last and slab.span[1] > first]
    return tuple(kinds)


def in_turns(slabs: int, share: float) -> list[float]:
    """Which slabs are on the host as a whole (1.0), and which are not (0.0): evenly, and neither the first nor the last
    ones, so that there is time to bring them, and for them to leave."""
    there = math.ceil(slabs * share)
    found = [0.0] * slabs
    for index in range(there):
        found[(index + 1) * slabs // (there + 1) if there < slabs else index] = 1.0
    return found


def passed_by(makings: Sequence[Making], dying: Iterable[Slabs]) -> list[dict[Slabs, int]]:
    """For each of the regions that follow each other, what of the slabs the later ones still need: from which element
    on."""
    needed = {grid: grid.sizes[grid.axis - 2] for grid in dying}
    found = []
    for making in reversed(makings):
        found.append(dict(needed))
        if needed:
            _, wanted = making.needs
            for grid in needed:
                if grid in wanted:
                    needed[grid] = min(needed[grid], wanted[grid][grid.axis - 2][0])
    return found[::-1]


def prepare(making: Making, courier: Courier) -> Callable[[], Tensor | Sum]:
    """Begin to bring what a region is made from; the result makes it, and is called once."""
    before, wanted = making.needs
    makings: list[tuple[Grid | None, Making]] = [(None, making), *before]
    near = {
        grid: courier.bring(grid, region)
        for grid, region in wanted.items()
        if isinstance(grid, Slabs) and not _is_empty(region)
    }

    def make() -> Tensor | Sum:
        users = Counter(grid for _, each in makings for grid in set(each.reads))
        here: dict[Grid, Tensor] = {grid: arrived() for grid, arrived in near.items()}
        near.clear()
        while True:
            grid, inner = makings.pop()
            crop = inner.crop
            crops = [] if _is_empty(crop) else [_near(each, here, wanted, crop) for each in inner.reads]
            for each in set(inner.reads):
                users[each] -= 1
                if not users[each]:
                    here.pop(each, None)
            if _is_empty(inner.region):
                continue
            made = inner.run(crops, grid)
            del crops
            if grid is None:
                return made
            # Several may read it, and kernels would copy it for each.
            here[grid] = dense(made)
            del made

    return make


def reachable(grids: Iterable[Grid]) -> set[Grid]:
    """These grids, and those that they would be made from."""
    found, left = set[Grid](), list(grids)
    while left:
        grid = left.pop()
        found.add(grid)
        left.extend(grid.reads if isinstance(grid, Anew) else ())
    return found


def layout_of(x: Tensor) -> torch.memory_format:
    """The order in memory of a grid or a part of one, so that what it goes into keeps it."""
    order = _order(x)
    last = _LAST.get(x.ndim)
    return last if last is not None and order == (0, *range(2, x.ndim), 1) else torch.contiguous_format


def dense(x: Tensor | Sum) -> Tensor:
    """The same without gaps in memory, such as a tile has that was cut out of what its borders spoiled; of a sum, its
    value."""
    if isinstance(x, Tensor):
        layout = layout_of(x)
        if x.is_contiguous(memory_format=layout) or _in_memory(x).is_contiguous():
            return x
        made = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
        move(made, x)
        return made
    made = torch.empty(x.x.shape, dtype=x.x.dtype, device=x.x.device, memory_format=layout_of(x.x))
    parts = [part for part in (made, x.x, x.branch) if part is not None]
    if len({_order(part) for part in parts}) == 1:
        branch = None if x.branch is None else _in_memory(x.branch)
        if write_rows(_in_memory(made), Sum(_in_memory(x.x), branch, x.bias)):
            return made
    del made, parts
    return dense(x.value())


def move(into: Tensor, source: Tensor) -> None:
    """Copy a part of a grid on the device; the same as `into.copy_(source)`."""
    if into.is_meta:
        return
    layout = _LAST.get(into.ndim)
    if layout and into.is_contiguous(memory_format=layout) and source.is_contiguous(memory_format=layout):
        # Nothing to find out: one block.
        into.copy_(source)
        return
    if _order(into) == _order(source):
        into, source = _in_memory(into), _in_memory(source)
    copy_rows(into, source)


def _order(x: Tensor) -> tuple[int, ...]:
    """The axes from the outermost to the innermost in memory; those of one element stay where they are."""
    plain, last = _ORDERS[x.ndim]
    sizes, strides = x.shape, x.stride()
    channels, found = sizes[1], plain
    if channels == 1 or strides[1] != 1:
        return plain
    for axis in range(2, len(sizes)):
        if sizes[axis] > 1:
            # A part of a plain grid has channels side by side only where it is one position wide.
            if strides[axis] < channels:
                return plain
            found = last
    return found


def _count_uploaded(part: Tensor) -> None:
    if (seen := rehearsal()) is not None:
        seen.uploaded += seen.times * part.nbytes


def _ask(making: Making, wanted: dict[Grid, Region]) -> None:
    crop = making.crop
    for grid in making.reads:
        known = wanted.get(grid, crop)
        wanted[grid] = tuple((min(a, c), max(b, d)) for (a, b), (c, d) in zip(known, crop, strict=True))


def _near(grid: Grid, here: Mapping[Grid, Tensor], wanted: dict[Grid, Region], crop: Region) -> Tensor:
    """A part of a grid, from what has come or was made of it, or from the grid itself."""
    if grid in here:
        return _part(here[grid], crop, [start for start, _ in wanted[grid]])
    assert isinstance(grid, Held)
    return _part(grid.data, crop, grid.begin)


def _is_empty(region: Region) -> bool:
    """Whether tiles that follow one another need nothing new."""
    start, stop = region[0]
    return start >= stop


def _part_of(slab: Slab, axis: int, region: Sequence[Span]) -> Tensor:
    begin = [0] * len(region)
    begin[axis - 2] = slab.span[0]
    return _part(slab.data, region, begin)


def _part(data: Tensor, region: Sequence[Span], begin: Sequence[int]) -> Tensor:
    for axis, ((start, stop), origin) in enumerate(zip(region, begin, strict=True), 2):
        if stop - start != data.shape[axis]:
            data = data.narrow(axis, start - origin, stop - start)
    return data


def _in_memory(x: Tensor) -> Tensor:
    return x.permute(_order(x))
