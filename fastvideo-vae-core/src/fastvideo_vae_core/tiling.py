"""Tile geometry: which part of a grid a part of the result needs. Knows no model.

A network is a sequence of steps between grids. Each step says, axis by axis, how its output depends on its input: from
how far away (the halo), at which scale, or from everywhere (`whole`). And it says which normalisation statistics it
takes over its whole input. That is enough to compute any step tile by tile with the same result as at once: a tile is
run on a crop that has its halo around it, padded only where it touches a true border, and what the crop's artificial
borders spoiled is cut off.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvideo_vae_core.errors import ShapeError
from fastvideo_vae_core.ops.norm import Moments


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
            the moments it takes them over what it sees.
        norm: the normalisation at the head of the step, whose statistics span the whole of the first grid.
        excerpt: where axes are whole: from whole grids to a region of the new one, along the axes behind (B, C), for
            less than the work of all of it. Attention has it: there are keys everywhere, and queries where asked.
    """

    name: str
    run: Callable[[Sequence[Tensor], Moments | None], Tensor]
    axes: tuple[Axis, ...]
    reads: tuple[str, ...] = ("x",)
    writes: str = "x"
    norm: nn.GroupNorm | None = None
    excerpt: Callable[[Sequence[Tensor], Sequence[slice]], Tensor] | None = None


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


def run_steps(steps: Sequence[Step], x: Tensor, tile: Sequence[int]) -> Tensor:
    """Run the steps tile by tile; the same numbers as running them at once, up to the order of additions.

    x: (B, C, ...); tile: extent of a tile along each axis behind (B, C), in elements of the finer of the two grids that
    a step goes between, because that one decides the memory of a tile.
    A grid is released after its last reader. Statistics are gathered while tiles are written.
    """
    grids, moments = {"x": x}, dict[str, Moments | None]()
    for index, step in enumerate(steps):
        reads = [grids[name] for name in step.reads]
        later = steps[index + 1 :]
        known = None if step.norm is None else _moments(reads[0], step.norm, moments.get(step.reads[0]))
        whole = Part.whole(step, reads[0].shape[2:])
        made, gathered = run_step(step, reads, known, tile, next_norm(step, later), whole)
        del reads
        grids[step.writes], moments[step.writes] = made, gathered
        for name in list(grids):
            if name != step.writes and not readers(name, later):
                del grids[name]
    return grids[steps[-1].writes]


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
) -> tuple[Tensor, Moments | None]:
    """A part of what a step makes, tile by tile, and its statistics for the norm that follows."""
    wanted = tuple(stop - start for start, stop in part.region)
    made: Tensor | None = None
    gathered: Moments | None = None
    cuts = regions(step.axes, part, tile)
    for region in _representatives(step.axes, cuts, part.sizes) if reads[0].is_meta else cuts:
        piece = _run_region(step, reads, moments, region, part)
        if following is not None:
            own = Moments.of(piece, following.num_groups)
            gathered = own if gathered is None else gathered.merge(own)
        if piece.shape[2:] == wanted:
            return piece, gathered
        if made is None:
            made = torch.empty((*piece.shape[:2], *wanted), dtype=piece.dtype, device=piece.device)
        into = (slice(span[0] - own[0], span[1] - own[0]) for span, own in zip(region, part.region, strict=True))
        made[(slice(None), slice(None), *into)] = piece
    assert made is not None
    return made, gathered


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


def _moments(grid: Tensor, norm: nn.GroupNorm, gathered: Moments | None) -> Moments:
    """Those that were gathered while the grid was written, if they are of the groups that the norm has."""
    if gathered is not None and gathered.mean.shape[1] == norm.num_groups:
        return gathered
    return Moments.of(grid, norm.num_groups)


def regions(axes: Sequence[Axis], part: Part, tile: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
    """The parts of the output of a step that are made one by one, each as [start, stop) along every axis."""
    cuts = []
    for axis, size, length, (start, stop) in zip(axes, part.sizes, tile, part.region, strict=True):
        made = axis.output_size(size)
        pieces = [(0, made)] if axis.whole else axis.cuts(made, length)
        inside = ((max(first, start), min(last, stop)) for first, last in pieces)
        cuts.append([span for span in inside if span[0] < span[1]])
    return itertools.product(*cuts)


def _representatives(
    axes: Sequence[Axis], regions: Iterator[tuple[tuple[int, int], ...]], sizes: Sequence[int]
) -> Iterator[tuple[tuple[int, int], ...]]:
    """Without numbers, two tiles of each size tell the memory of all."""
    seen = Counter[tuple[int, ...]]()
    for region in regions:
        needs = (axis.needs(*span, size) for axis, span, size in zip(axes, region, sizes, strict=True))
        crop = tuple(last - first for first, last in needs)
        seen[crop] += 1
        if seen[crop] <= 2:
            yield region


def _run_region(
    step: Step, reads: Sequence[Tensor], moments: Moments | None, region: tuple[tuple[int, int], ...], part: Part
) -> Tensor:
    crop, keep = [slice(None), slice(None)], [slice(None), slice(None)]
    for axis, (start, stop), size, origin in zip(step.axes, region, part.sizes, part.begin, strict=True):
        first, last = axis.needs(start, stop, size)
        crop.append(slice(first - origin, last - origin))
        skip = start - axis.position(first)
        keep.append(slice(skip, skip + stop - start))
    return step.run([grid[tuple(crop)] for grid in reads], moments)[tuple(keep)]
