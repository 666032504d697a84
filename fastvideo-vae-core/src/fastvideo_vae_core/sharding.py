"""One call on several devices: every grid is cut into slabs along one axis, one slab for each rank.

Before a step each rank fetches the elements that its slab of the output depends on beyond its own: the rows of its
neighbours, further ones where slabs are thin, or everything where the step needs the whole axis. Statistics are merged
over the ranks in one order, so that all normalise alike. All of it goes through one function, `Ranks.fetch`. Only
borders of the whole grid are padded, so the slabs together are what one device would make.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastvideo_vae_core.errors import ConfigError
from fastvideo_vae_core.lines import Line
from fastvideo_vae_core.ops.norm import Moments
from fastvideo_vae_core.ranks import Ranks, Slab, Span
from fastvideo_vae_core.tiling import Part, Step, next_norm, readers, run_step

if TYPE_CHECKING:
    from fastvideo_vae_core.blending import BlendedTiles


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Which ranks compute a call together, and how. Ranks are those of the group, which need not be the world.

    Every rank makes the same plan, and the same call with the same weights and the whole input.

    Attributes:
        group: what the ranks talk through. After an exception inside a call it is of no use any more.
        axis: the axis behind (B, C) that is cut into slabs. None: the one that the fewest steps need whole, and the
            longest of those.
        destination: the rank that gets the whole result; every other gets its slab of it. None: every rank gets its
            slab, whose place is `span`.
        timeout: seconds that a rank waits for others before it gives up. NCCL has a deadline of its own, which the
            group is made with and at which the process ends; let that one be longer.
        pixels: decoded pictures become the levels that a file has, as `media.images.to_uint8` makes them, before they
            are sent: uint8, a quarter of float32 and half of bfloat16.
        line: how this rank is connected with the others.
    """

    group: Any
    axis: int | None = None
    destination: int | None = 0
    timeout: float = 300.0
    pixels: bool = False
    line: Line = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "line", Line(self.group, self.timeout))
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


def run_sharded(
    steps: Sequence[Step],
    x: Tensor,
    tile: Sequence[int] | None,
    sharding: Sharding,
    done: Callable[[], None] = lambda: None,
) -> Tensor:
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
            data, gathered = _run_part(step, reads, known, tile, next_norm(step, later), part, axis.whole, done)
            if spans[rank][0] == spans[rank][1]:
                data, gathered = data.narrow(ranks.axis, 0, 0), None
            del reads
            grids[step.writes], moments[step.writes] = Slab(data, ranks.axis, spans), gathered
    last = grids[steps[-1].writes]
    # After a step over the whole axis every rank has everything.
    start, stop = sharding.spans(last.spans[-1][1])[rank]
    return last.data.narrow(ranks.axis, start - last.spans[rank][0], stop - start)


def run_blended(
    tiles: BlendedTiles,
    compute: Callable[[Sequence[slice]], Tensor],
    x: Tensor,
    sharding: Sharding,
) -> Tensor:
    """Blended tiles, which ranks compute in turns, one each; one rank joins them as a single device would.

    compute: what the network makes of a crop. x: the whole input, on every rank. The result is this rank's slab.
    """
    ranks = Ranks(sharding)
    joins = 0 if sharding.destination is None else sharding.destination
    rounds = [tiles.crops[start : start + ranks.world] for start in range(0, len(tiles.crops), ranks.world)]

    def collected() -> Iterator[Tensor]:
        for crops in rounds:
            if x.is_meta:
                # Who joins has the tiles of a round at once.
                yield from [compute(crop) for crop in crops]
                continue
            own = compute(crops[ranks.rank]) if ranks.rank < len(crops) else None
            yield from ranks.collect(own, x, joins)

    if x.is_meta:
        whole = tiles.join(collected())
        start, stop = sharding.span(whole.shape[ranks.axis])
        return whole.narrow(ranks.axis, start, stop - start)
    if ranks.rank == joins:
        return ranks.scatter(tiles.join(collected()), x, joins)
    for _ in collected():
        pass
    return ranks.scatter(None, x, joins)


def _run_part(
    step: Step,
    reads: Sequence[Tensor],
    moments: Moments | None,
    tile: Sequence[int] | None,
    following: nn.GroupNorm | None,
    part: Part,
    whole: bool,
    done: Callable[[], None],
) -> tuple[Tensor, Moments | None]:
    if whole and step.excerpt is not None:
        made = step.excerpt(reads, [slice(*span) for span in part.region])
        done()
        return made, None
    largest = [max(size, axis.output_size(size)) for axis, size in zip(step.axes, part.sizes, strict=True)]
    return run_step(step, reads, moments, tile or largest, following, part, done)


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
    return Moments.merged(
        [
            Moments(layer * (stop - start), mean, spread)
            for (start, stop), (mean, spread) in zip(slab.spans, packed, strict=False)
            if start < stop
        ]
    )


def _at_least_one(span: Span, size: int) -> Span:
    """A rank without elements computes one and keeps none: so it learns how wide the grid is, for what comes later."""
    start = min(span[0], size - 1)
    return start, max(span[1], start + 1)
