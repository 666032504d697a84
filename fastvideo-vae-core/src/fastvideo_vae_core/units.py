"""Progress of a call: it is computed in units, and between two of them whoever waits is told, and may stop it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fastvideo_vae_core.plan import Plan
from fastvideo_vae_core.sharding import Sharding
from fastvideo_vae_core.tiling import Part, Step, next_norm, regions

# Called with the units that are done and how many there are.
Progress = Callable[[int, int], object]


class Units:
    """Counts the units of one attempt at a call: items of a batch, pieces of frames, layers, or tiles of a step.

    groups: of items, one behind the other; all have the same units.
    progress: told (0, total) before the first unit and (done, total) behind each; what it raises ends the call.
    """

    def __init__(self, groups: int = 1, progress: Progress | None = None) -> None:
        self._groups, self._progress = groups, progress
        self._done = self._total = 0

    def begin(self, count: int) -> None:
        """A group of items begins, which has so many units."""
        if self._total == 0:
            self._total = self._groups * count
            self._tell()

    def done(self) -> None:
        """One more unit is done."""
        self._done += 1
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total)


def count_parts(steps: Sequence[Step], sizes: Sequence[int], plan: Plan) -> int:
    """How many parts the steps are run in, on this rank: `tiling.run_steps`, or `sharding.run_sharded`.

    sizes: of the first grid along each axis behind (B, C).
    """
    sharding, places = plan.sharding, plan.places
    total, extents = 0, {"x": tuple(sizes)}
    for index, step in enumerate(steps):
        read = extents[step.reads[0]]
        part = Part.whole(step, read)
        made = extents[step.writes] = tuple(stop for _, stop in part.region)
        if index < len(places) and places[index] == "anew" and next_norm(step, steps[index + 1 :]) is None:
            # Computed where it is read.
            continue
        if sharding is not None:
            assert sharding.axis is not None
            if step.axes[sharding.axis].whole and step.excerpt is not None:
                total += 1
                continue
            if not step.axes[sharding.axis].whole:
                part = replace(part, region=_own(part, sharding, made[sharding.axis]))
        tile = plan.tiles[index] if plan.tiles else plan.tile or tuple(map(max, read, made))
        total += sum(1 for _ in regions(step.axes, part, tile))
    return total


def _own(part: Part, sharding: Sharding, size: int) -> tuple[tuple[int, int], ...]:
    """The region of a part that this rank makes, at least one element of it."""
    assert sharding.axis is not None
    start, stop = sharding.span(size)
    start = min(start, size - 1)
    return (*part.region[: sharding.axis], (start, max(stop, start + 1)), *part.region[sharding.axis + 1 :])
