"""A video on several devices: each rank has a strip of every picture, at every resolution, and runs the network on it.

The network runs piece by piece in time, as it does alone. Where a layer looks beyond the strip it asks through the
cache of the call (`ops.causal.Cache`), and the ranks exchange what they need of the piece: the border rows that a
convolution sees, or the whole pictures for attention. So nothing is computed twice, no rank holds more than its share
of a piece, and exchanges are as many as convolutions and pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastvideo_vae_core.plan import Plan
from fastvideo_vae_core.ranks import Ranks, Slab, Span
from fastvideo_vae_core.sharding import Sharding


class Strip:
    """This rank's rows, or columns, of every picture of a video (B, C, T, H, W).

    Sizes are multiples of those of the latents, so a strip is cut between latents, and what that makes of it stays its
    share at every resolution. With fewer latents than ranks some have none; they take no part.

    Attributes:
        along: what is cut, 0 rows or 1 columns.
        neighbours: whether another strip lies before this one, and behind it.
    """

    def __init__(self, sharding: Sharding, latents: int, rank: int | None = None) -> None:
        assert sharding.axis is not None
        self.ranks, self.along = Ranks(sharding), sharding.axis - 1
        # On shapes alone the memory of any rank can be predicted.
        self.ranks.rank = self.ranks.rank if rank is None else rank
        self._latents, self._axis = latents, sharding.axis + 2
        self._spans = sharding.spans(latents)
        start, stop = self._spans[self.ranks.rank]
        # Whether this rank has nothing.
        self.empty = start == stop
        self.neighbours = (start > 0, stop < latents)

    def cut(self, x: Tensor) -> Tensor:
        """The strip of whole pictures; the last one has what is left over where they end between latents."""
        size = x.shape[self._axis]
        start, stop = self._scaled(size // self._latents)[self.ranks.rank]
        return x.narrow(self._axis, start, (stop if self.neighbours[1] else size) - start)

    def gathered(self, x: Tensor) -> Tensor:
        """The whole pictures of which x is a strip, at the size of the latents."""
        everything = [(0, self._latents) if start < stop else (start, stop) for start, stop in self._spans]
        (made,) = self.ranks.fetch([(Slab(x, self._axis, self._spans), everything)])
        return made

    def widened(self, x: Tensor, before: int, after: int) -> Tensor:
        """The strip x with so many rows more, where there is another."""
        rows, axis = x.movedim(1, -1), self._axis - 1
        width, size = max(before, after), rows.shape[axis]
        first, last = rows.narrow(axis, 0, width), rows.narrow(axis, size - width, width)
        found, behind = self.beside(first, last)
        parts = [
            *([] if found is None or not before else [found.narrow(axis, width - before, before)]),
            rows,
            *([] if behind is None or not after else [behind.narrow(axis, 0, after)]),
        ]
        return torch.cat(parts, axis).movedim(-1, 1)

    def narrowed(self, y: Tensor, before: int, after: int) -> Tensor:
        """What was made of a widened strip, without so many rows where it was widened."""
        before, after = before * self.neighbours[0], after * self.neighbours[1]
        return y.narrow(self._axis, before, y.shape[self._axis] - before - after)

    def beside(self, first: Tensor, last: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """For the first and last rows of this strip those that lie before and behind it; None where pictures end."""
        # What each rank has is a pair; of all pairs in a row, those of the neighbours stand next to it.
        pair = torch.stack([first, last])
        busy = [rank for rank, (start, stop) in enumerate(self._spans) if start < stop]
        places = {rank: 2 * place for place, rank in enumerate(busy)}
        end = 2 * len(busy)
        spans = tuple((places.get(rank, 0), places.get(rank, -2) + 2) for rank in range(len(self._spans)))
        wanted = [(max(start - 1, 0), min(stop + 1, end)) if start < stop else (start, stop) for start, stop in spans]
        (found,) = self.ranks.fetch([(Slab(pair, 0, spans), wanted)])
        before, behind = self.neighbours
        return found[0] if before else None, found[-1] if behind else None

    def run(self, network: Callable[[Tensor], Tensor], x: Tensor, output: Sequence[int]) -> Tensor:
        """What a network makes of the strip of a whole video; `output` is the shape of all of it."""
        if not self.empty:
            return network(self.cut(x))
        shape = list(output)
        shape[self._axis] = 0
        return x.new_empty(shape)

    def result(self, made: Tensor, size: int) -> Tensor:
        """This rank's even share of a result of that size, out of strips, which end between latents."""
        spans = self._scaled(size // self._latents)
        (share,) = self.ranks.fetch([(Slab(made, self._axis, spans), self.ranks.sharding.spans(size))])
        return share

    def assembled(self, made: Sequence[Tensor], output: Sequence[int], like: Tensor) -> Tensor:
        """A piece of a stream at the destination, elsewhere a share of it; there may be no frames in it.

        made: what this rank has of it, in parts along the frames; `output` is the shape of all of it but for its
            frames, `like` has its type.
        """
        own = torch.tensor(sum(part.shape[2] for part in made), device=like.device)
        # A rank with an empty strip learns it here.
        frames = int(self.ranks.gather(own).max())
        shape = [*output[:2], frames, *output[3:]]
        if not frames:
            return like.new_empty(shape)
        shape[self._axis] = 0
        whole = torch.cat([*made], 2) if made else like.new_empty(shape)
        return self.ranks.assemble(self.result(whole, output[self._axis]), output[self._axis])

    def _scaled(self, scale: int) -> tuple[Span, ...]:
        return tuple((scale * start, scale * stop) for start, stop in self._spans)


def run_strip(network: Callable[[Tensor, Strip | None], Tensor], x: Tensor, plan: Plan, channels: int) -> Tensor:
    """This rank's share of what a network makes of a video.

    network: from a strip of the video to that of the result. x: the whole video, on every rank.
    channels: of the result.
    """
    sharding = plan.sharding
    assert sharding is not None
    assert sharding.axis is not None
    axis = sharding.axis + 2
    output = (len(x), channels, *plan.output_shape[2:])
    if sharding.axis == 0:
        # Networks go through the whole time, so every rank computes everything.
        start, stop = sharding.span(output[2])
        return network(x, None)[:, :, start:stop]
    latents = (plan.output_shape if plan.direction == "encode" else plan.input_shape)[axis]
    strip = Strip(sharding, latents, _busiest(sharding, latents) if x.is_meta else None)
    return strip.result(strip.run(lambda part: network(part, strip), x, output), output[axis])


def _busiest(sharding: Sharding, latents: int) -> int:
    """The rank with the most, one in the middle if it can be, which has neighbours at both sides."""
    spans = sharding.spans(latents)
    lengths = [stop - start for start, stop in spans]
    return max(range(len(spans)), key=lambda rank: (lengths[rank], -abs(2 * rank + 1 - len(spans))))
