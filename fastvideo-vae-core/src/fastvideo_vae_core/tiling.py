"""Tile geometry: which part of a grid a part of the result needs. Knows no model.

A network is a sequence of steps between grids. Each step says, axis by axis, how its output depends on its input: from
how far away (the halo), at which scale, or from everywhere (`whole`). And it says which normalisation statistics it
takes over its whole input. That is enough to compute any step tile by tile with the same result as at once: a tile is
run on a crop that has its halo around it, padded only where it touches a true border, and what the crop's artificial
borders spoiled is cut off.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fastvideo_vae_core.errors import ShapeError
from fastvideo_vae_core.grids import (
    Anew,
    Courier,
    Grid,
    Held,
    Making,
    Memories,
    Place,
    Region,
    Slabs,
    dense,
    follow,
    in_turns,
    kind_of,
    layout_of,
    move,
    passed_by,
    prepare,
    reachable,
)
from fastvideo_vae_core.memory import excerpt, rehearsal, standing_for
from fastvideo_vae_core.ops.norm import Moments
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.rehearsal import device_of


@dataclass(frozen=True, kw_only=True)
class Axis:
    """How one axis of a step's output depends on the same axis of its input.

    Attributes:
        before, after: halo, in input elements beyond those that an output element stands for.
        up: output elements for an input element; `down`: input elements for an output element. One of them is 1.
        lead: elements of the finer grid that the first coarse element lacks: a causal video network has one latent
            frame for the first picture and one for every further 4, so a step with `up=2, lead=1` makes 2n - 1 frames.
        whole: every output element needs the whole axis.
    """

    before: int = 0
    after: int = 0
    up: int = 1
    down: int = 1
    lead: int = 0
    whole: bool = False

    def output_size(self, size: int) -> int:
        """Length of the output for an input of that length."""
        return size * self.up - self.lead if self.up > 1 else (size + self.lead) // self.down

    def needs(self, start: int, stop: int, size: int) -> tuple[int, int]:
        """The input elements [first, last) of `size` that the output elements [start, stop) are made from."""
        if self.whole:
            return 0, size
        if self.up > 1:
            # Whatever a crop begins with lacks the lead, as the first element of the whole does.
            first = (start + self.lead) // self.up - (1 if self.lead else 0)
            last = -(-(stop + self.lead) // self.up)
        else:
            first, last = start * self.down - self.lead, stop * self.down - self.lead
        first = max(first - self.before, 0)
        # The crop begins where an output element begins, so that strided steps keep their phase.
        return first - first % self.down, min(last + self.after, size)

    def continues(self, start: int, stop: int, size: int) -> tuple[int, int] | None:
        """The input elements [first, last) of `size` that the output elements [start, stop) take beyond those that
        everything before them is made from; none where all of them stand for elements that are known. None where what
        is behind does not tell."""
        if self.whole or self.after:
            return None
        if self.up > 1:
            first, last = (-(-(edge + self.lead) // self.up) if edge else 0 for edge in (start, stop))
        else:
            first, last = max(start * self.down - self.lead, 0), stop * self.down - self.lead
        return min(first, size), min(last, size)

    def finished(self, size: int) -> int:
        """How many output elements are made from the first `size` input elements, whatever comes behind them."""
        if self.up > 1:
            return max((size - self.after) * self.up - self.lead, 0)
        return max((size + self.lead - self.after) // self.down, 0)

    def cuts(self, size: int, tile: int) -> list[tuple[int, int]]:
        """The output elements [0, size) in pieces of about `tile` elements of the finer grid, cut between elements of
        the coarser one, so that nothing is computed for two of them."""
        if self.up == 1:
            return spans(size, -(-tile // self.down))
        pieces = spans(-(-(size + self.lead) // self.up), -(-tile // self.up))
        edges = [max(start * self.up - self.lead, 0) for start, _ in pieces]
        return list(itertools.pairwise([*edges, size]))

    def position(self, first: int) -> int:
        """Index of the first output element of a crop that begins at input element `first`."""
        return first * self.up // self.down


POINTWISE = Axis()
WHOLE = Axis(whole=True)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A piece of a network that makes one grid from others, between two places where tiles must meet.

    Attributes:
        name: for people, and for the report of a plan.
        reads: names of the grids it takes, all of the same extent; the network's input is "x".
        writes: name of the grid it makes; the last step's is the network's output.
        axes: one for each axis behind (B, C), about the network with its own padding at every border of a crop.
        run: from the grids and, where `norm` is set, the moments of the first of them, to the new grid. Given None for
            the moments it takes them over what it sees. A sum is added up in the pass that puts it into its place.
        trims: whether `run` takes a third argument, which says for each axis whether the crop goes on by the halo at
            both ends. There it need not pad, and may give what is in between only, which saves computing the rest.
        passes: whether `run` takes a dict `memory`, in which it keeps what it needs of the frames that it has seen.
            Then tiles that follow one another along the first axis alone need no halo in front of them.
        norm: the normalisation at the head of the step, whose statistics span the whole of the first grid.
        pending: a bias (C) that the grid still lacks, because whoever reads it adds it without a pass over memory; its
            statistics are those behind the bias.
        excerpt: where axes are whole: from whole grids to a region of the new one, along the axes behind (B, C), for
            less than the work of all of it. Attention has it: there are keys everywhere, and queries where asked.
    """

    name: str
    run: Callable[..., Tensor | Sum]
    axes: tuple[Axis, ...]
    reads: tuple[str, ...] = ("x",)
    writes: str = "x"
    norm: nn.GroupNorm | None = None
    pending: Tensor | None = None
    trims: bool = False
    passes: bool = False
    excerpt: Callable[[Sequence[Tensor], Sequence[slice]], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What a rehearsal saw of a step.

    Attributes:
        step: the step.
        reads: numbers of the steps that made what it reads; -1 is the network's input.
        kept: likewise of what somebody reads later, the grid itself not among them.
        sizes: of the grids that it reads, along each axis behind (B, C).
        made: bytes of the grid that it made.
        peak: bytes that were there at the worst moment of the step.
        work: multiplications.
        following: whether a norm asks for the statistics of that grid.
    """

    step: Step
    reads: tuple[int, ...]
    kept: tuple[int, ...]
    sizes: tuple[int, ...]
    made: int
    peak: int
    work: float
    following: bool


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a step, for those who have only a part of its input.

    Attributes:
        sizes: of the whole input along each axis behind (B, C).
        begin: where the part of the input that is there begins, along each axis.
        region: the elements of the output to make.
    """

    sizes: tuple[int, ...]
    begin: tuple[int, ...]
    region: tuple[tuple[int, int], ...]

    @classmethod
    def whole(cls, step: Step, sizes: Sequence[int]) -> Part:
        """All of the output, from all of the input."""
        made = (axis.output_size(size) for axis, size in zip(step.axes, sizes, strict=True))
        return cls(sizes=tuple(sizes), begin=(0,) * len(sizes), region=tuple((0, size) for size in made))


def run_steps(
    steps: Sequence[Step],
    x: Tensor,
    tile: Sequence[int],
    places: Sequence[Place] = (),
    host_shares: Sequence[float] = (),
    *,
    tiles: Sequence[Sequence[int]] = (),
    done: Callable[[], None] = lambda: None,
) -> Tensor:
    """Run the steps tile by tile; the same numbers as running them at once, up to the order of additions.

    x: (B, C, ...); tile: extent of a tile along each axis behind (B, C), in elements of the finer of the two grids that
    a step goes between, because that one decides the memory of a tile.
    tiles: the same of each step, where they differ.
    places: where each step's grid lies; by default all lie in one tensor on the device, as the last one always does.
    host_shares: of each step's grid in slabs, how much of it lies on the host; by default nothing.
    done: told behind each tile of a step.
    A grid is released after its last reader. Statistics are gathered while tiles are written.
    """
    begin = (0,) * (x.ndim - 2)
    grids: dict[str, Grid] = {"x": Held(index=-1, sizes=tuple(x.shape[2:]), data=x, begin=begin)}
    moments = dict[str, Moments | None]()
    seen, passed = rehearsal(), list[Passed]()
    with Courier(device_of(x), real=not x.is_meta) as courier:
        for index, step in enumerate(steps):
            place = places[index] if index < len(steps) - 1 and places else "device"
            tile = tiles[index] if tiles else tile
            reads = tuple(grids[name] for name in step.reads)
            later = steps[index + 1 :]
            known = None
            if step.norm is not None:
                known = _moments(reads[0], step.norm, moments.get(step.reads[0]), tile, courier)
            whole, following = Part.whole(step, reads[0].sizes), next_norm(step, later)
            left = {name: grid for name, grid in grids.items() if name != step.writes and readers(name, later)}
            kept = reachable([*left.values(), *(reads if place == "anew" else ())])
            dying = [grid for grid in reachable(grids.values()) - kept if isinstance(grid, Slabs)]
            # What nobody reads any more goes before the step, but for what it reads itself.
            grids = dict(left)
            share = host_shares[index] if host_shares else 0.0
            before = 0.0 if seen is None else seen.work
            if seen is not None:
                seen.since()
            made, gathered = _run_step(
                step, reads, known, tile, following, whole, courier, place, dying=dying, host_share=share, done=done
            )
            sizes = tuple(stop for _, stop in whole.region)
            if isinstance(made, Tensor):
                grids[step.writes] = Held(index=index, sizes=sizes, data=made, begin=begin)
            elif made is not None:
                grids[step.writes] = replace(made, index=index)
            else:
                grids[step.writes] = Anew(index=index, sizes=sizes, step=step, reads=reads, moments=known)
            moments[step.writes] = gathered
            if seen is not None:
                passed.append(
                    Passed(
                        step=step,
                        reads=tuple(each.index for each in reads),
                        sizes=reads[0].sizes,
                        kept=tuple(each.index for each in left.values()),
                        made=_bytes(made),
                        peak=seen.since(),
                        work=seen.work - before,
                        following=following is not None,
                    )
                )
            del reads, made, dying, kept
    if seen is not None:
        seen.steps = passed
    last = grids[steps[-1].writes]
    assert isinstance(last, Held)
    return last.data


def _bytes(grid: Tensor | Slabs | None) -> int:
    if isinstance(grid, Slabs):
        return sum(slab.data.nbytes for slab in grid.slabs)
    return 0 if grid is None else grid.nbytes


def readers(name: str, later: Sequence[Step]) -> list[Step]:
    """The steps that read a grid before its name is written again."""
    found = []
    for step in later:
        if name in step.reads:
            found.append(step)
        if step.writes == name:
            break
    return found


def next_norm(step: Step, later: Sequence[Step]) -> nn.GroupNorm | None:
    """The norm that is going to ask for the statistics of what a step writes."""
    heads = (each.norm for each in readers(step.writes, later) if each.reads[0] == step.writes)
    return next((norm for norm in heads if norm is not None), None)


def run_step(
    step: Step,
    reads: Sequence[Tensor],
    moments: Moments | None,
    tile: Sequence[int],
    following: nn.GroupNorm | None,
    part: Part,
    done: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Moments | None]:
    """A part of what a step makes, tile by tile, and its statistics for the norm that follows; `done` is told behind
    each tile."""
    grids = [Held(index=-1, sizes=part.sizes, data=data, begin=part.begin) for data in reads]
    with Courier(device_of(reads[0]), real=not reads[0].is_meta) as courier:
        made, gathered = _run_step(step, grids, moments, tile, following, part, courier, "device", done=done)
    assert isinstance(made, Tensor)
    return made, gathered


def _run_step(
    step: Step,
    reads: Sequence[Grid],
    moments: Moments | None,
    tile: Sequence[int],
    following: nn.GroupNorm | None,
    part: Part,
    courier: Courier,
    place: Place,
    *,
    dying: Sequence[Slabs] = (),
    host_share: float = 0.0,
    done: Callable[[], None] = lambda: None,
) -> tuple[Tensor | Slabs | None, Moments | None]:
    """The same from grids wherever they are, to a grid at a place; None if it lies nowhere.

    dying: grids in slabs that nobody reads afterwards.
    """
    if place == "anew" and following is None:
        return None, None
    wanted = tuple(stop - start for start, stop in part.region)
    areas = list(regions(step.axes, part, tile))
    memories: Memories | None = {} if follow(step, reads, areas) else None
    makings = [Making(step, tuple(reads), moments, region, memories) for region in areas]
    axis = next((i for i, (span, all_) in enumerate(zip(areas[0], part.region, strict=True)) if span != all_), 0)
    slabs = Slabs(index=-1, sizes=wanted, axis=axis + 2, entire=memories is not None)
    shares = in_turns(len(areas), host_share) if slabs.entire else [host_share] * len(areas)
    needed = passed_by(makings, dying)
    # Where slabs go and come no tile is like another.
    slides = bool(dying) or any(shares)
    tiles = excerpt(range(len(makings)), lambda index: index if slides else kind_of(makings[index]))
    made: Tensor | None = None
    gathered = list[Moments]()
    like: Callable[[Region], Tensor] = partial(_blank, (1, 1), torch.float32, torch.contiguous_format)
    coming: Callable[[], Tensor | Sum] | None = None
    for index, making in enumerate(makings):
        times = tiles[index][1]
        make, coming = coming, None
        upcoming = tiles[index + 1][1] if index + 1 < len(tiles) else 0
        if not times and not upcoming and place != "slabs":
            continue
        with standing_for(times):
            make = prepare(making, courier) if make is None and times else make
        if courier.ahead and index + 1 < len(tiles) and (times or upcoming):
            with standing_for(upcoming):
                coming = prepare(makings[index + 1], courier)
        if not times and place != "slabs":
            continue
        with standing_for(times):
            # A rehearsal does not compute every tile, but keeps it.
            piece = make() if make is not None and times else like(making.region)
            if place == "slabs" or following is not None or isinstance(piece, Sum):
                # Once, where statistics and the slab would each copy it.
                piece = dense(piece)
            # It holds what it is made from.
            del make
            if not index:
                # What the step before has left.
                courier.let_go()
            done()
            like = partial(_blank, piece.shape[:2], piece.dtype, layout_of(piece))
            for grid in dying:
                courier.release(grid, needed[index][grid])
            if following is not None and times:
                gathered.append(Moments.of(piece, following.num_groups, step.pending))
            local = tuple((a - c, b - c) for (a, b), (c, _) in zip(making.region, part.region, strict=True))
            if place == "device":
                if piece.shape[2:] == wanted:
                    return piece, gathered[0] if gathered else None
                if made is None:
                    made = torch.empty(
                        (*piece.shape[:2], *wanted),
                        dtype=piece.dtype,
                        device=piece.device,
                        memory_format=layout_of(piece),
                    )
                move(made[(slice(None), slice(None), *(slice(*span) for span in local))], piece)
            elif place == "slabs":
                courier.store(piece, slabs, local, local[axis], shares[index])
            del piece
    courier.turn()
    return slabs if place == "slabs" else made, Moments.merged(gathered) if gathered else None


def slide(axis: Axis, chunks: Iterable[Tensor], run: Callable[[Tensor], Tensor], tile: int) -> Iterator[Tensor]:
    """Run a network over input (B, C, n, ...) that comes in chunks, and yield its output as it is finished.

    axis: how the output depends on the input; run: the network, padding where its input ends; tile: the most elements
    of a piece of the output. Every piece is made from the whole context that it depends on, and nothing older is kept.
    """
    held: Tensor | None = None
    begin = made = size = 0
    for chunk in itertools.chain(chunks, [None]):
        if chunk is not None:
            held = chunk if held is None else torch.cat([held, chunk], dim=2)
            size += chunk.shape[2]
        ready = axis.output_size(size) if chunk is None else axis.finished(size)
        while held is not None and made < ready:
            stop = min(made + tile, ready)
            first, last = axis.needs(made, stop, size)
            skip = made - axis.position(first)
            yield run(held[:, :, first - begin : last - begin])[:, :, skip : skip + stop - made]
            made = stop
            # A copy, so that what is no longer needed can be released.
            oldest, _ = axis.needs(made, made + 1, size)
            held, begin = held[:, :, oldest - begin :].clone(), oldest


def spans(size: int, tile: int) -> list[tuple[int, int]]:
    """Cut [0, size) into the fewest pieces of at most `tile` elements, as even as they can be."""
    if tile < 1:
        raise ShapeError(f"a tile must have at least 1 element, got {tile}")
    pieces = -(-size // tile)
    edges = [size * each // pieces for each in range(pieces + 1)]
    return list(itertools.pairwise(edges))


def _blank(shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format, region: Region) -> Tensor:
    """A tile without numbers."""
    sizes = (stop - start for start, stop in region)
    return torch.empty((*shape, *sizes), dtype=dtype, device="meta", memory_format=layout)


def _moments(
    grid: Grid, norm: nn.GroupNorm, gathered: Moments | None, tile: Sequence[int], courier: Courier
) -> Moments:
    """Those that were gathered while the grid was written, if they are of the groups that the norm has."""
    if gathered is not None and gathered.mean.shape[1] == norm.num_groups:
        return gathered
    if isinstance(grid, Held):
        return Moments.of(grid.data, norm.num_groups)
    step = Step(name="moments", run=lambda grids, _: grids[0], axes=(POINTWISE,) * len(grid.sizes))
    _, found = _run_step(step, [grid], None, tile, norm, Part.whole(step, grid.sizes), courier, "anew")
    assert found is not None
    return found


def regions(axes: Sequence[Axis], part: Part, tile: Sequence[int]) -> Iterator[Region]:
    """The tiles of a part of a step's grid, each as [start, stop) along every axis."""
    cuts = []
    for axis, size, length, (start, stop) in zip(axes, part.sizes, tile, part.region, strict=True):
        made = axis.output_size(size)
        pieces = [(0, made)] if axis.whole else axis.cuts(made, length)
        inside = ((max(first, start), min(last, stop)) for first, last in pieces)
        cuts.append([span for span in inside if span[0] < span[1]])
    return itertools.product(*cuts)


def crop_sizes(axes: Sequence[Axis], region: Region, sizes: Sequence[int]) -> tuple[int, ...]:
    """How many elements a region is made from, along each axis."""
    needs = (axis.needs(*span, size) for axis, span, size in zip(axes, region, sizes, strict=True))
    return tuple(last - first for first, last in needs)
