"""The plan that a memory budget asks for: the fastest that is predicted to fit.

Peaks are rehearsed. Times are only compared, so a rough model of a step is enough: its multiplications, the bytes that
it gets from the host and sends there, and the CPU's time to ask for all that, which go on beside each other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from fastvideo_vae_core.errors import MemoryBudgetError
from fastvideo_vae_core.grids import Anew, Grid, Making, Memories, Place, Region, follow
from fastvideo_vae_core.memory import format_bytes
from fastvideo_vae_core.plan import Plan
from fastvideo_vae_core.tiling import Axis, Part, Passed, crop_sizes, regions

# Of an H100: multiplications of 16-bit convolutions a second, as whole decoders reach them, and bytes a second over
# PCIe from and to pinned memory, in each direction. Other GPUs are slower in both.
_MULTIPLICATIONS, _BYTES = 2.5e14, 5e10

# Seconds in which a CPU asks for what a step does with one tile, measured beside that H100. Faster ones lose little by
# the larger tiles that follow from it.
_ASKING = 7e-4

# How much longer a step of large tiles should take than a CPU takes to ask for it.
_EASE = 4

# A plan without the host that is at most this much slower than the whole is good enough to look no further.
_GOOD = 1.1

# Grids that are smaller than this share of the budget stay on the device.
_SMALL = 1 / 64

# A plan of single frames that is at most this much slower than the whole need not be compared with others.
_FAIR = 1.5

# How much slower larger slabs may be for both to be tried further.
_NEAR = 1.02

# How often an estimate of the memory is corrected.
_ATTEMPTS = 6

# What a share on the host may lose to slabs of whole rows.
_ROUNDING = 1 / 64


def choose(plan: Plan, budget: int, tiles: Sequence[tuple[int, ...]], slabs: Sequence[tuple[int, ...]]) -> Plan:
    """The plan itself if it fits; else with smaller pieces of the batch and in time, which cost nothing; else in tiles;
    else with grids on the host or computed anew.

    tiles, slabs: what there is to choose from. A slab is cut along one axis, so that it lies in memory in few blocks;
    the host is used with slabs only.

    Raises:
        MemoryBudgetError: nothing fits; the message says the least that would do.
    """
    search = _Search(plan, budget)
    found = search.untiled() or search.tiled([*tiles, *slabs]) if tiles or slabs else search.untiled()
    whole = found is not None and not found.places and found.tile == plan.tile
    if slabs and not whole and plan.device.type == "cuda" and plan.sharding is None:
        slow = None if found is None else search.slowness(found)
        if slow is None or slow > _GOOD:
            placed = search.placed(slabs)
            if placed is not None and (slow is None or search.slowness(placed) < slow):
                found = placed
    if found is None:
        raise MemoryBudgetError(
            f"{plan.direction} of {plan.input_shape} needs {format_bytes(search.least)} or more, the budget is"
            f" {format_bytes(budget)}; raise it, or take a smaller input or a 16-bit dtype"
        )
    return replace(found, notes=(*found.notes, f"chosen for a budget of {format_bytes(budget)}"))


class _Search:
    """The plans for one call, and what is known of them."""

    def __init__(self, plan: Plan, budget: int) -> None:
        self.plan, self.budget = plan, budget
        self.chunks = [] if plan.chunk is None else [plan.chunk >> by for by in range(1, plan.chunk.bit_length())]
        self.smallest = replace(plan, items=1, chunk=self.chunks[-1] if self.chunks else plan.chunk)
        self.least: int = plan.peak_bytes
        self._steps: Sequence[Passed] | None = None
        self._models: dict[tuple[tuple[int, ...], ...], Model] = {}

    def untiled(self) -> Plan | None:
        """The plan, or with smaller pieces."""
        fewer = replace(self.plan, items=1)
        # Where the result is most of the memory, items one by one cost more than all together: it is there besides.
        smaller = (replace(each, chunk=chunk) for each in (fewer, self.plan) for chunk in self.chunks)
        return self._first([self.plan, fewer, *smaller])

    def tiled(self, tiles: Sequence[tuple[int, ...]]) -> Plan | None:
        """Tiles, with all grids on the device; those that recompute least."""
        plans = [replace(self.smallest, mode="tiled", tile=tile) for tile in tiles]
        if not plans or (self._first([plans[-1]]) is None and self._first([min(plans, key=_area)]) is None):
            return None
        if self.plan.sharding is not None:
            return self._first(plans)
        return self._in_larger_pieces(self._first(sorted(plans, key=self.slowness)))

    def placed(self, slabs: Sequence[tuple[int, ...]]) -> Plan | None:
        """Slabs, with the large grids in slabs too or computed anew, and as little on the host as fits. Where tiles can
        follow one another these are of single frames, for which nothing is computed twice."""
        if any(each.step.passes for each in self.steps):
            frames = self._in_slabs((1, *self._extent[1:]))
            if frames is not None and self.slowness(frames) < _FAIR:
                return self._in_larger_pieces(self._in_larger_tiles(frames))
        found = list[Plan]()
        for tile in reversed(slabs):
            plan = self._in_slabs(tile)
            if plan is None or (found and self.slowness(plan) >= _NEAR * self.slowness(found[-1])):
                # Larger ones need more.
                break
            found.append(plan)
        grown = [self._in_larger_tiles(plan) for plan in found[-2:]]
        return self._in_larger_pieces(min(grown, key=self.slowness, default=None))

    @property
    def steps(self) -> Sequence[Passed]:
        """What a rehearsal sees of the steps, each in one tile."""
        if self._steps is None:
            self._steps = replace(self.smallest, mode="tiled", tile=self._extent).forecast.steps
        return self._steps

    def slowness(self, plan: Plan) -> float:
        """Estimated time as a multiple of the whole's."""
        model = self._model(plan)
        return model.time(plan.places, plan.host_shares) / model.whole

    def _model(self, plan: Plan) -> Model:
        assert plan.tile is not None
        tiles = plan.tiles or (plan.tile,) * len(self.steps)
        if tiles not in self._models:
            self._models[tiles] = Model(self.steps, tiles)
        return self._models[tiles]

    def _in_slabs(self, tile: tuple[int, ...]) -> Plan | None:
        large = [index for index, each in enumerate(self.steps[:-1]) if each.made > _SMALL * self.budget]
        places = tuple[Place, ...]("slabs" if index in large else "device" for index in range(len(self.steps)))
        all_ = tuple(float(place == "slabs") for place in places)
        plan = replace(self.smallest, mode="tiled", tile=tile, places=places)
        if self._first([replace(plan, host_shares=all_)]) is None:
            return None
        seen = plan.forecast
        model = self._model(plan)
        room = [self.budget - (seen.peak - max(each.peak for each in seen.steps))] * len(places)
        # What a step takes beside the grids, which the model knows.
        beside = [each.peak - sum(live) for each, live in zip(seen.steps, model.live(places), strict=True)]
        fitting = list[Plan]()
        for _ in range(_ATTEMPTS):
            found = model.fastest(places, large, [have - need for have, need in zip(room, beside, strict=True)])
            if found is None:
                break
            tried = replace(plan, places=found[0], host_shares=found[1])
            fits = self._first([tried]) is not None
            if fits and fitting and (tried == fitting[-1] or self.slowness(tried) > self.slowness(fitting[-1])):
                break
            if fits:
                fitting.append(tried)
            # To compute anew takes memory that the model does not know, and grids that stay on the device take none;
            # what fits is tried again with what the steps took.
            taken = zip(beside, tried.forecast.steps, model.live(*found), strict=True)
            beside = [max(each.peak - sum(live), 0 if fits else known) for known, each, live in taken]
        return fitting[-1] if fitting else self._first([replace(plan, host_shares=all_)])

    @property
    def _extent(self) -> tuple[int, ...]:
        """Of the widest grid along each axis behind (B, C)."""
        return tuple(map(max, self.plan.input_shape[2:], self.plan.output_shape[2:]))

    def _along_frames(self, tile: tuple[int, ...]) -> bool:
        """Whether tiles follow one another along the first axis."""
        return any(each.step.passes for each in self.steps) and tile[1:] == self._extent[1:]

    def _in_larger_tiles(self, plan: Plan) -> Plan:
        """The same with two, four or more slabs as one in the steps that have memory for it, such as those of coarse
        grids: each slab's halo is put together once more, and asked for."""
        assert plan.tile is not None
        model, seen = self._model(plan), plan.forecast
        room = self.budget - (seen.peak - max(each.peak for each in seen.steps))
        frames = self._along_frames(plan.tile)
        times = []
        for index, (each, grids) in enumerate(zip(seen.steps, model.live(plan.places, plan.host_shares), strict=True)):
            beside = max(each.peak - sum(grids), 1)
            most = max((room - sum(grids)) // beside, 1)
            if frames:
                # Nothing is computed twice, and a slab need not be put together where it is a tile.
                near = model.behind([index, *each.reads], plan.places)
                hosted = any(plan.host_shares[grid] for grid in near)
                ease = _EASE * model.asked(index) * _MULTIPLICATIONS / (each.work + 1)
                most = 1 if hosted else max(min(most, int(ease)), 1)
            times.append(1 << (most.bit_length() - 1))
        cut = 0 if frames else len(plan.tile) - 2
        while max(times) > 1:
            lengths = [min(plan.tile[cut] * by, self._extent[cut]) for by in times]
            tiles = ((*plan.tile[:cut], length, *plan.tile[cut + 1 :]) for length in lengths)
            grown = replace(plan, tiles=tuple(tiles))
            if self._first([grown]) is not None:
                return grown
            # Smaller ones where there was no room, and in those that made what was read there, which stays for longer.
            over = [index for index, each in enumerate(grown.forecast.steps) if each.peak > room]
            worst = set[int](over)
            for index in over:
                worst |= model.behind([*self.steps[index].reads, *self.steps[index].kept], plan.places)
            if all(times[index] == 1 for index in worst):
                break
            times = [max(by // 2, 1) if index in worst else by for index, by in enumerate(times)]
        return plan

    def _in_larger_pieces(self, plan: Plan | None) -> Plan | None:
        """The same with more latent frames at a time, where that fits too."""
        if plan is None or not self.chunks:
            return plan
        larger = [self.plan.chunk, *self.chunks[:-1]]
        return self._first([replace(plan, chunk=chunk) for chunk in larger]) or plan

    def _first(self, plans: Sequence[Plan]) -> Plan | None:
        for plan in plans:
            self.least = min(self.least, plan.peak_bytes)
            if plan.peak_bytes <= self.budget:
                return plan
        return None


class Model:
    """Estimates of the time and the memory of steps, each in tiles of its own, for grids in several places."""

    def __init__(self, steps: Sequence[Passed], tiles: Sequence[Sequence[int]]) -> None:
        self.steps = steps
        self.whole = sum(max(each.work / _MULTIPLICATIONS, _ASKING) for each in steps)
        self._regions = [_kinds(each, tile) for each, tile in zip(steps, tiles, strict=True)]
        self._sizes = {-1: steps[0].sizes}
        for index, each in enumerate(steps):
            self._sizes[index] = tuple(map(Axis.output_size, each.step.axes, each.sizes))
        self._known: dict[tuple[int, frozenset[int]], tuple[float, float, list[tuple[int, int, float]]]] = {}

    def fastest(
        self, places: Sequence[Place], large: Sequence[int], room: Sequence[int]
    ) -> tuple[tuple[Place, ...], tuple[float, ...]] | None:
        """Each large grid where it costs least time, changed one by one for as long as that helps, with the shares on
        the host that it takes; None if nothing fits.

        room: bytes that each step has for grids.
        """
        best, shares = list(places), self._shares(places, room)
        if shares is None:
            return None
        least, better = self.time(best, shares), True
        while better:
            better = False
            for index in large:
                other = list(best)
                other[index] = "anew" if best[index] == "slabs" else "slabs"
                needed = self._shares(other, room)
                if needed is not None and (time := self.time(other, needed)) < 0.999 * least:
                    best, shares, least, better = other, needed, time, True
        return tuple(best), shares

    def time(self, places: Sequence[Place], shares: Sequence[float]) -> float:
        """Estimated seconds."""
        return sum(self._times(places, shares))

    def asked(self, index: int) -> float:
        """Seconds in which a CPU asks for a step, at least."""
        return _ASKING * sum(times for _, times in self._regions[index])

    def live(self, places: Sequence[Place], shares: Sequence[float] = ()) -> Iterator[tuple[int, int]]:
        """Bytes of the grids that are on the device in each step: in one tensor, and in slabs."""
        for held, slabs in self._grids(places):
            yield sum(self.steps[each].made for each in held), self._passing(slabs, shares)

    def _shares(self, places: Sequence[Place], room: Sequence[int]) -> tuple[float, ...] | None:
        """What has to be on the host, evenly of all grids or rather of those that are read least, whichever is faster
        or moves less; None if that is not enough."""
        reads = Counter(grid for each in self.steps for grid in self.behind(each.reads, places))
        found = (self._shared(places, room, order) for order in (None, reads))
        possible = [shares for shares in found if shares is not None]

        def cost(shares: tuple[float, ...]) -> tuple[float, float]:
            each = zip(self.steps, shares, range(len(shares)), strict=True)
            moved = sum(step.made * share * (1 + reads[index]) for step, share, index in each)
            return round(self.time(places, shares), 4), moved

        return min(possible, key=cost, default=None)

    def _shared(
        self, places: Sequence[Place], room: Sequence[int], reads: Mapping[int, int] | None
    ) -> tuple[float, ...] | None:
        shares = [0.0] * len(places)
        for have, (held, (kept, dying, made)) in zip(room, self._grids(places), strict=True):
            have -= sum(self.steps[each].made for each in held)
            # At the beginning of the step, and at its end.
            for group in (kept + dying, kept + made):
                there = sum(self.steps[each].made for each in group)
                if there <= have:
                    continue
                if have < 0:
                    return None
                if reads is None:
                    for index in group:
                        shares[index] = max(shares[index], min(1.0 - have / there + _ROUNDING, 1.0))
                    continue
                for index in sorted(group, key=lambda each: reads[each]):
                    near = sum(self.steps[each].made * (1.0 - shares[each]) for each in group)
                    if near > have:
                        more = (near - have) / self.steps[index].made + _ROUNDING
                        shares[index] = min(shares[index] + more, 1.0)
        return tuple(shares)

    def _passing(self, slabs: tuple[list[int], list[int], list[int]], shares: Sequence[float] = ()) -> int:
        """The grid that is made takes the place of those that go."""
        here = [
            each.made * (1.0 - share) for each, share in zip(self.steps, shares or [0.0] * len(self.steps), strict=True)
        ]
        kept, dying, made = (sum(here[each] for each in group) for group in slabs)
        return math.ceil(kept + max(dying, made))

    def _grids(self, places: Sequence[Place]) -> Iterator[tuple[list[int], tuple[list[int], list[int], list[int]]]]:
        """The grids that are there in each step: in one tensor; and in slabs those that stay, go and come."""
        for index, each in enumerate(self.steps):
            before = self.behind([*each.reads, *each.kept], places)
            after = self.behind([*each.kept, *(each.reads if places[index] == "anew" else ())], places)
            in_slabs = {grid for grid in before if places[grid] == "slabs"}
            held = [grid for grid in before if places[grid] == "device"]
            made = [index] if places[index] == "slabs" else []
            if places[index] == "device":
                held.append(index)
            yield held, ([*(in_slabs & after)], [*(in_slabs - after)], made)

    def behind(self, grids: Sequence[int], places: Sequence[Place]) -> set[int]:
        """The grids in memory that these are, or would be made from."""
        found, left = set[int](), [each for each in grids if each >= 0]
        while left:
            grid = left.pop()
            if places[grid] == "anew":
                left += [each for each in self.steps[grid].reads if each >= 0]
            else:
                found.add(grid)
        return found

    def _times(self, places: Sequence[Place], shares: Sequence[float]) -> Iterator[float]:
        for index, each in enumerate(self.steps):
            place = places[index] if places else "device"
            if place == "anew" and not each.following:
                continue
            work, asked, read = self._needs(index, self._anew(index, places))
            up = 0.0
            if shares:
                for grid, times, near in read:
                    up += times * shares[grid] * self.steps[grid].made * near
            down = shares[index] * each.made if shares and place == "slabs" else 0.0
            yield max(work / _MULTIPLICATIONS, up / _BYTES, down / _BYTES, asked * _ASKING)

    def _anew(self, index: int, places: Sequence[Place]) -> frozenset[int]:
        """The grids that a step computes anew for what it reads."""
        found, left = set[int](), list(self.steps[index].reads if places else ())
        while left:
            grid = left.pop()
            if grid >= 0 and places[grid] == "anew" and grid not in found:
                found.add(grid)
                left += self.steps[grid].reads
        return frozenset(found)

    def _needs(self, index: int, anew: frozenset[int]) -> tuple[float, float, list[tuple[int, int, float]]]:
        """Of a step, where these grids are computed anew: its multiplications, what it asks for, and how much it reads
        of which other grids, each for so many tiles."""
        if (index, anew) in self._known:
            return self._known[index, anew]
        step, grids = self.steps[index], {each: Grid(index=each, sizes=sizes) for each, sizes in self._sizes.items()}
        for each in sorted(anew):
            source, sizes = self.steps[each], self._sizes[each]
            reads = tuple(grids[grid] for grid in source.reads)
            grids[each] = Anew(index=each, sizes=sizes, step=source.step, reads=reads, moments=None)
        work, asked, read = 0.0, 0.0, list[tuple[int, int, float]]()
        reads = tuple(grids[grid] for grid in step.reads)
        memories: Memories | None = {} if follow(step.step, reads, [area for area, _ in self._regions[index]]) else None
        for region, times in self._regions[index]:
            making = Making(step.step, reads, None, region, memories)
            before, wanted = making.needs
            makings: list[tuple[Grid | None, Making]] = [(None, making), *before]
            asked += times * len(makings)
            for made, part in makings:
                source = step if made is None else self.steps[made.index]
                work += times * source.work * _share(source, part)
            for grid, box in wanted.items():
                if grid.index >= 0 and not isinstance(grid, Anew):
                    near = math.prod((b - a) / size for (a, b), size in zip(box, grid.sizes, strict=True))
                    read.append((grid.index, times, near))
        self._known[index, anew] = work, asked, read
        return work, asked, read


def _area(plan: Plan) -> int:
    assert plan.tile is not None
    return math.prod(plan.tile)


def _kinds(passed: Passed, tile: Sequence[int]) -> list[tuple[Region, int]]:
    """A tile of each size, and how many there are; those in the middle stand for all."""
    found, counts = dict[tuple[int, ...], Region](), Counter[tuple[int, ...]]()
    for region in regions(passed.step.axes, Part.whole(passed.step, passed.sizes), tile):
        size = crop_sizes(passed.step.axes, region, passed.sizes)
        counts[size] += 1
        if counts[size] <= 2:
            found[size] = region
    return [(region, counts[size]) for size, region in found.items()]


def _share(passed: Passed, making: Making) -> float:
    """What a step computes for a region, with what is cut off, as a part of what it makes of all."""
    share = 1.0
    axes = zip(passed.step.axes, making.region, making.crop, making.inner, passed.sizes, strict=True)
    for axis, (start, stop), (first, last), inner, size in axes:
        exact = inner or making.memories is not None
        share *= (stop - start if exact else axis.output_size(last - first)) / axis.output_size(size)
    return share
