"""One call on several devices: every grid is cut into slabs along one axis, one slab for each rank.

Before a step each rank fetches the elements that its slab of the output depends on beyond its own: the rows of its
neighbours, further ones where slabs are thin, or everything where the step needs the whole axis. Statistics are merged
over the ranks in one order, so that all normalise alike. All of it goes through one function, `Ranks.fetch`. Only
borders of the whole grid are padded, so the slabs together are what one device would make.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastvideo_vae_core.errors import ConfigError, ShardError
from fastvideo_vae_core.ops.norm import Moments
from fastvideo_vae_core.tiling import Part, Step, next_norm, readers, run_step

# Elements [start, stop) of an axis.
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Which ranks compute a call together, and how. Ranks are those of the group, which need not be the world.

    Every rank makes the same plan, and the same call with the same weights and the whole input.

    Attributes:
        group: what the ranks talk through. After a ShardError it is of no use any more.
        axis: the axis behind (B, C) that is cut into slabs. None: the one that the fewest steps need whole, and the
            longest of those.
        destination: the rank that gets the whole result; every other gets its slab of it. None: every rank gets its
            slab, whose place is `span`.
        timeout: seconds that a rank waits for others before it gives up.
    """

    group: Any
    axis: int | None = None
    destination: int | None = 0
    timeout: float = 300.0

    def __post_init__(self) -> None:
        if self.destination is not None and not 0 <= self.destination < self.world:
            raise ConfigError(f"destination {self.destination} is no rank of a group of {self.world}")
        if self.timeout <= 0:
            raise ConfigError(f"a timeout must be positive, got {self.timeout}")

    @classmethod
    def over(cls, mesh: Any) -> Sharding:
        """From a DeviceMesh of one axis, a process group, or what already says how."""
        if isinstance(mesh, Sharding):
            return mesh
        if isinstance(mesh, DeviceMesh):
            if mesh.ndim != 1:
                raise ConfigError(f"grids are cut along one axis, and the mesh has {mesh.ndim}; pass mesh[name]")
            return cls(group=mesh.get_group())
        return cls(group=mesh)

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return int(self.group.rank())

    @property
    def world(self) -> int:
        """Ranks of the group."""
        return int(self.group.size())

    def along(self, steps: Sequence[Step], sizes: Sequence[int]) -> Sharding:
        """With the axis chosen, for steps that begin with a grid of these sizes behind (B, C)."""
        if self.axis is None:
            whole = [sum(step.axes[axis].whole for step in steps) for axis in range(len(sizes))]
            return replace(self, axis=min(range(len(sizes)), key=lambda axis: (whole[axis], -sizes[axis])))
        if not 0 <= self.axis < len(sizes):
            raise ConfigError(f"there is no axis {self.axis} behind (B, C); there are {len(sizes)}")
        return self

    def span(self, size: int, rank: int | None = None) -> Span:
        """The elements that a rank, by default this one, has of an axis with `size` of them; there may be none."""
        return self.spans(size)[self.rank if rank is None else rank]

    def spans(self, size: int) -> tuple[Span, ...]:
        """The elements that each rank has, as even as they can be."""
        return tuple(itertools.pairwise(size * rank // self.world for rank in range(self.world + 1)))

    def __str__(self) -> str:
        where = "every rank keeps its slab" if self.destination is None else f"whole on rank {self.destination}"
        return f"{self.world} ranks, slabs along axis {self.axis} behind (B, C), {where}"


class Slab(NamedTuple):
    """A rank's part of a grid: the elements `spans[rank]` of `axis`. All ranks know the spans of all.

    Where every rank has the whole grid, which an input or a step over the whole axis gives, all spans are that.
    """

    data: Tensor
    axis: int
    spans: tuple[Span, ...]

    @property
    def everywhere(self) -> bool:
        """Whether every rank has the whole grid."""
        return self.spans[0] == self.spans[-1]


class Ranks:
    """What the ranks of a group say to each other during one call."""

    def __init__(self, sharding: Sharding) -> None:
        assert sharding.axis is not None
        self.sharding, self.rank, self.world = sharding, sharding.rank, sharding.world
        # Of a tensor (B, C, ...).
        self.axis = sharding.axis + 2

    def fetch(self, wanted: Sequence[tuple[Slab, Sequence[Span]]]) -> list[Tensor]:
        """The elements that each rank wants of some grids, in one exchange.

        wanted: slabs, and for each the span of every rank; the same on all ranks.

        Raises:
            ShardError: a rank did not answer in time, or is gone.
        """
        made = [self._own(slab, spans[self.rank]) for slab, spans in wanted]
        operations: list[dist.P2POp] = []
        received: list[tuple[Tensor, Tensor]] = []
        for (slab, spans), target in zip(wanted, made, strict=True):
            if target.is_meta:
                continue
            for peer in range(self.world):
                start, stop = _message(slab, spans, self.rank, peer)
                if start < stop:
                    rows = slab.data.narrow(slab.axis, start - slab.spans[self.rank][0], stop - start).contiguous()
                    operations.append(self._operation(dist.isend, rows, peer))
                start, stop = _message(slab, spans, peer, self.rank)
                if start < stop:
                    into = target.narrow(slab.axis, start - spans[self.rank][0], stop - start)
                    rows = torch.empty_like(into, memory_format=torch.contiguous_format)
                    operations.append(self._operation(dist.irecv, rows, peer))
                    received.append((into, rows))
        self._finish(operations)
        for into, rows in received:
            into.copy_(rows)
        return made

    def gather(self, own: Tensor) -> Tensor:
        """Small tensors of all ranks, in a new first axis."""
        spans = tuple((rank, rank + 1) for rank in range(self.world))
        (made,) = self.fetch([(Slab(own[None], 0, spans), [(0, self.world)] * self.world)])
        return made

    def agree(self, plan: object, device: torch.device) -> None:
        """Make sure that all ranks are here, with the same plan.

        Raises:
            ConfigError: another rank has another plan.
        """
        digest = torch.tensor(zlib.crc32(repr(plan).encode()), device=device)
        others = [rank for rank, each in enumerate(self.gather(digest).tolist()) if each != int(digest)]
        if others:
            raise ConfigError(
                f"rank {self.rank} and ranks {others} made other plans; give all the same call and options"
            )

    def agree_on_any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is true on any rank."""
        return bool(self.gather(torch.tensor(int(flag), device=device)).any())

    def assemble(self, own: Tensor, size: int) -> Tensor:
        """The whole result at the destination, elsewhere what is there; `size` is the whole's along the axis."""
        spans = self.sharding.spans(size)
        target = self.sharding.destination
        wanted = [(0, size) if rank == target else span for rank, span in enumerate(spans)]
        (made,) = self.fetch([(Slab(own, self.axis, spans), wanted)])
        # No rank is done before all are, so that none goes on as if a call had worked that failed elsewhere.
        self.gather(torch.zeros((), device=own.device))
        return made

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Tell the other ranks why this one fails; they learn it when they have waited in vain."""
        try:
            yield
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
            _shortly(lambda: self._store().set(_KEY.format(self.rank), told))
            raise

    def _own(self, slab: Slab, span: Span) -> Tensor:
        """A tensor of those elements; the ones that this rank does not have are still to be filled in."""
        (start, stop), (first, last) = slab.spans[self.rank], span
        if start <= first and last <= stop:
            return slab.data.narrow(slab.axis, first - start, last - first)
        shape = list(slab.data.shape)
        shape[slab.axis] = last - first
        grown = torch.empty(shape, dtype=slab.data.dtype, device=slab.data.device, memory_format=_order(slab.data))
        low, high = max(start, first), min(stop, last)
        if low < high:
            here = slab.data.narrow(slab.axis, low - start, high - low)
            grown.narrow(slab.axis, low - first, high - low).copy_(here)
        return grown

    def _operation(self, kind: Any, rows: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, rows, group=self.sharding.group, group_peer=peer)

    def _finish(self, operations: list[dist.P2POp]) -> None:
        if not operations:
            return
        peers = sorted({operation.group_peer for operation in operations})
        end = time.monotonic() + self.sharding.timeout
        try:
            for work in dist.batch_isend_irecv(operations):
                left = max(end - time.monotonic(), 1e-3)
                if not work.wait(timedelta(seconds=left)):
                    raise ShardError("aborted")
        except RuntimeError as error:
            # What backends raise, for a timeout and a closed connection alike.
            raise ShardError(self._story(peers, time.monotonic() - end + self.sharding.timeout)) from error

    def _story(self, peers: list[int], waited: float) -> str:
        told: dict[int, str] = {}

        def ask() -> None:
            for rank in range(self.world):
                if rank != self.rank and self._store().check([_KEY.format(rank)]):
                    told[rank] = self._store().get(_KEY.format(rank)).decode()

        _shortly(ask)
        first = {rank: said for rank, said in told.items() if not said.startswith(ShardError.__name__)}
        causes = [f"rank {rank} failed with {said}" for rank, said in (first or told).items()]
        why = "; ".join(causes) or "it is lost, stopped or slow, or made another call"
        return (
            f"rank {self.rank} of {self.world} gave up after {waited:.1f} s of at most {self.sharding.timeout:g} s for"
            f" an exchange with rank {' and '.join(map(str, peers))}: {why}; start the ranks again with a new group"
        )

    def _store(self) -> Any:
        return self.sharding.group.get_group_store()


def run_sharded(steps: Sequence[Step], x: Tensor, tile: Sequence[int] | None, sharding: Sharding) -> Tensor:
    """Run the steps on this rank's slabs, each tile by tile if there are tiles, to this rank's slab of the result.

    x: the whole input, on every rank. All ranks call it with the same arguments; see `tiling.run_steps`.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise ConfigError("nothing is differentiable on several devices; use torch.no_grad(), or one device")
    ranks = Ranks(sharding)
    along = ranks.axis - 2
    # On shapes alone the memory of a rank in the middle is predicted, which has neighbours at both sides.
    rank = ranks.rank = ranks.world // 2 if x.is_meta else ranks.rank
    size = x.shape[ranks.axis]
    grids, moments = {"x": Slab(x, ranks.axis, ((0, size),) * ranks.world)}, dict[str, Moments | None]()
    with torch.no_grad():
        for index, step in enumerate(steps):
            later = steps[index + 1 :]
            read = [grids[name] for name in step.reads]
            axis, size = step.axes[along], read[0].spans[-1][1]
            made = axis.output_size(size)
            alike = axis.whole and step.excerpt is None
            spans = ((0, made),) * ranks.world if alike else sharding.spans(made)
            wanted = [axis.needs(*_at_least_one(span, made), size) for span in spans]
            requests: list[tuple[Slab, Sequence[Span]]] = [(slab, wanted) for slab in read]
            if step.norm is not None:
                requests.append(_parts(ranks, read[0], step.norm.num_groups, moments.get(step.reads[0])))
            for name in set(step.reads):
                # What is fetched takes its place, unless another step is going to read it.
                if name == step.writes or not readers(name, later):
                    del grids[name]
            reads = ranks.fetch(requests)
            known = None if step.norm is None else _merged(reads.pop(), requests[0][0], step.norm.num_groups)
            del read, requests
            part = _part(step, reads[0], along, wanted[rank], size, _at_least_one(spans[rank], made))
            data, gathered = _run_part(step, reads, known, tile, next_norm(step, later), part, axis.whole)
            if spans[rank][0] == spans[rank][1]:
                data, gathered = data.narrow(ranks.axis, 0, 0), None
            del reads
            grids[step.writes], moments[step.writes] = Slab(data, ranks.axis, spans), gathered
    last = grids[steps[-1].writes]
    # After a step over the whole axis every rank has everything.
    start, stop = sharding.spans(last.spans[-1][1])[rank]
    return last.data.narrow(ranks.axis, start - last.spans[rank][0], stop - start)


def _run_part(
    step: Step,
    reads: Sequence[Tensor],
    moments: Moments | None,
    tile: Sequence[int] | None,
    following: nn.GroupNorm | None,
    part: Part,
    whole: bool,
) -> tuple[Tensor, Moments | None]:
    if whole and step.excerpt is not None:
        return step.excerpt(reads, [slice(*span) for span in part.region]), None
    largest = [max(size, axis.output_size(size)) for axis, size in zip(step.axes, part.sizes, strict=True)]
    return run_step(step, reads, moments, tile or largest, following, part)


def _part(step: Step, read: Tensor, axis: int, has: Span, size: int, span: Span) -> Part:
    sizes, begin = list(read.shape[2:]), [0] * len(step.axes)
    sizes[axis], begin[axis] = size, has[0]
    region = list(Part.whole(step, sizes).region)
    region[axis] = span
    return Part(sizes=tuple(sizes), begin=tuple(begin), region=tuple(region))


def _parts(ranks: Ranks, slab: Slab, groups: int, gathered: Moments | None) -> tuple[Slab, list[Span]]:
    """The moments of each rank's slab, as a grid (ranks, 2, B, groups) of which every rank wants all."""
    data = slab.data
    if gathered is None or gathered.mean.shape[1] != groups:
        gathered = Moments.of(data, groups) if data.numel() else None
    packed = data.new_zeros(1, 2, len(data), groups, dtype=torch.float64)
    if gathered is not None:
        packed[0] = torch.stack([gathered.mean, gathered.spread])
    if slab.everywhere:
        return Slab(packed, 0, ((0, 1),) * ranks.world), [(0, 1)] * ranks.world
    return Slab(packed, 0, tuple((rank, rank + 1) for rank in range(ranks.world))), [(0, ranks.world)] * ranks.world


def _merged(packed: Tensor, slab: Slab, groups: int) -> Moments:
    """Moments of all slabs together, in the order of the ranks, so that every rank gets the same bits."""
    shape = list(slab.data.shape)
    shape[slab.axis] = 1
    layer = math.prod(shape[1:]) // groups
    total: Moments | None = None
    for (start, stop), (mean, spread) in zip(slab.spans, packed, strict=False):
        if start < stop:
            own = Moments(layer * (stop - start), mean, spread)
            total = own if total is None else total.merge(own)
    assert total is not None
    return total


def _message(slab: Slab, wanted: Sequence[Span], sender: int, receiver: int) -> Span:
    """What one rank sends to another; nothing to who has all that it wants."""
    (first, last), (start, stop) = wanted[receiver], slab.spans[receiver]
    if sender == receiver or (start <= first and last <= stop):
        return (0, 0)
    start, stop = slab.spans[sender]
    return max(first, start), min(last, stop)


def _at_least_one(span: Span, size: int) -> Span:
    """A rank without elements computes one and keeps none: so it learns how wide the grid is, for what comes later."""
    start = min(span[0], size - 1)
    return start, max(span[1], start + 1)


def _order(x: Tensor) -> torch.memory_format:
    """The order in memory, so that what is fetched keeps the layout of what is there."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    plain = last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last)
    return torch.contiguous_format if plain or last is None else last


def _shortly(talk: Any) -> None:
    """Talk to the store, but never wait for one that is lost with the process that kept it."""

    def run() -> None:
        with contextlib.suppress(Exception):
            talk()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(1.0)


_KEY = "fastvideo_vae/failed/{}"
