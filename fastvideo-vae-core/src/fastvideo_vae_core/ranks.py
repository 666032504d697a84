"""What the ranks of a group say to each other during one call: parts of grids, in one exchange at a time.

How they are connected, and what happens when one of them is lost, is the business of `fastvideo_vae_core.lines`.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastvideo_vae_core.errors import ConfigError

if TYPE_CHECKING:
    from fastvideo_vae_core.sharding import Sharding

# Elements [start, stop) of an axis.
Span = tuple[int, int]


class Ranks:
    """What the ranks of a group say to each other during one call."""

    def __init__(self, sharding: Sharding) -> None:
        assert sharding.axis is not None
        self.sharding, self.rank, self.world = sharding, sharding.rank, sharding.world
        self.line = sharding.line
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
        if operations:
            self.line.exchange(operations)
        for into, rows in received:
            into.copy_(rows)
        return made

    def gather(self, own: Tensor) -> Tensor:
        """Small tensors of all ranks, in a new first axis; they are there when it returns."""
        spans = tuple((rank, rank + 1) for rank in range(self.world))
        (made,) = self.fetch([(Slab(own[None], 0, spans), [(0, self.world)] * self.world)])
        self.line.settle()
        return made

    def collect(self, own: Tensor | None, like: Tensor, target: int) -> list[Tensor]:
        """Tensors of any shape, one of each rank that has one, in their order; elsewhere than at the target none.

        like: has their type and number of axes.
        """
        shapes = self.shapes(own, like)
        sizes = [math.prod(shape) for shape in shapes]
        spans = tuple(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
        wanted = [(0, spans[-1][1]) if rank == target else span for rank, span in enumerate(spans)]
        (made,) = self.fetch([(Slab((like.new_empty(0) if own is None else own).reshape(-1), 0, spans), wanted)])
        if self.rank != target:
            return []
        parts = zip(made.split(sizes), shapes, strict=True)
        return [part.view(shape) for part, shape in parts if part.numel()]

    def scatter(self, whole: Tensor | None, like: Tensor, source: int) -> Tensor:
        """Each rank's slab of what one rank has; like: has its type and number of axes."""
        shape = self.shapes(whole, like)[source]
        size = shape[self.axis]
        spans = tuple((0, size if rank == source else 0) for rank in range(self.world))
        if whole is None:
            shape[self.axis] = 0
            whole = like.new_empty(shape)
        (made,) = self.fetch([(Slab(whole, self.axis, spans), self.sharding.spans(size))])
        return made

    def shapes(self, own: Tensor | None, like: Tensor) -> list[list[int]]:
        """The shape of what each rank has; zeros where it has nothing."""
        shape = [0] * like.ndim if own is None else own.shape
        return [[*map(int, each)] for each in self.gather(torch.tensor(shape, device=like.device)).tolist()]

    def agree(self, plan: object, device: torch.device) -> None:
        """Make sure that all ranks are here, with the same plan.

        Raises:
            ConfigError: another rank has another plan, or the group cannot send what lies on that device.
        """
        if device.type == "cuda" and not self.line.queues(device):
            raise ConfigError("the group sends nothing that lies on a GPU; make it with the backend nccl")
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


def _message(slab: Slab, wanted: Sequence[Span], sender: int, receiver: int) -> Span:
    """What one rank sends to another; nothing to who has all that it wants."""
    (first, last), (start, stop) = wanted[receiver], slab.spans[receiver]
    if sender == receiver or (start <= first and last <= stop):
        return (0, 0)
    start, stop = slab.spans[sender]
    return max(first, start), min(last, stop)


def _order(x: Tensor) -> torch.memory_format:
    """The order in memory, so that what is fetched keeps the layout of what is there."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    plain = last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last)
    return torch.contiguous_format if plain or last is None else last
