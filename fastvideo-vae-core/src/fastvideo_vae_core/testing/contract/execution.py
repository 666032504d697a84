"""One answer, whatever the way: whole, item by item, streamed, tiled, on several devices, or what a budget chooses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastvideo_vae_core.blending import Blend
from fastvideo_vae_core.errors import ConfigError, MemoryBudgetError, ShapeError
from fastvideo_vae_core.grids import Place
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.sharding import Sharding
from fastvideo_vae_core.testing.contract.hooks import VAE, Hooks, both_directions, distance, moments
from fastvideo_vae_core.testing.ranks import on_ranks

# So many tiles at most in a test, because each is a run of its own.
MOST_TILES = 40


class ExecutionContract(Hooks):
    """Every plan gives the same numbers, and does what it says."""

    @both_directions
    def test_sliced_equals_whole(self, vae: VAE, direction: Direction) -> None:
        x = self.example(vae, direction, batch=3)
        whole = self.run(vae, direction, x)
        vae.enable_slicing()
        assert self.plan(vae, direction, tuple(x.shape)).items == 1
        assert distance(self.run(vae, direction, x), whole) <= self.fp32_bound
        vae.disable_slicing()
        assert self.plan(vae, direction, tuple(x.shape)).items == 3
        two = self.plan(vae, direction, tuple(x.shape), items=2)
        assert distance(self.run(vae, direction, x, two), whole) <= self.fp32_bound

    @both_directions
    def test_streamed_equals_whole(self, vae64: VAE, direction: Direction) -> None:
        for grid in self.latent_grids:
            x = self.example(vae64, direction, grid=grid)
            whole = self.run(vae64, direction, x)
            for source in (x, self.chunks(x)):
                pieces = self.stream(vae64, direction, source)
                assert distance(torch.cat(pieces, self.stream_axis), whole) <= self.fp64_bound

    @both_directions
    def test_tiled_equals_whole(self, vae64: VAE, direction: Direction) -> None:
        x = self.example(vae64, direction, batch=1)
        whole = self.run(vae64, direction, x)

        @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(tile=tiles(largest_grid(vae64, x, direction)))
        def check(tile: tuple[int, ...]) -> None:
            plan = self.plan(vae64, direction, tuple(x.shape), tile=tile)
            assert distance(self.run(vae64, direction, x, plan), whole) <= self.fp64_bound

        check()

    @both_directions
    def test_tiled_equals_whole_at_the_extremes(self, vae: VAE, direction: Direction) -> None:
        """Float32, a batch of two; tiles of one element along one axis, tiles of two, and larger than the image."""
        x = self.example(vae, direction)
        whole = self.run(vae, direction, x)
        extent = largest_grid(vae, x, direction)
        thin = [tuple(1 if axis == index else size for index, size in enumerate(extent)) for axis in range(len(extent))]
        for tile in (*thin, (2,) * len(extent), tuple(3 * size for size in extent)):
            plan = self.plan(vae, direction, tuple(x.shape), tile=tile)
            assert distance(self.run(vae, direction, x, plan), whole) <= self.fp32_bound, tile

    @both_directions
    def test_sharded_equals_whole(self, vae64: VAE, direction: Direction) -> None:
        """Over fewer and more ranks than a grid has elements, to the one that is to have the result and to none."""
        for world, destination, grid in zip((3, 2, 5), (1, None, 0), self.latent_grids, strict=False):
            x = self.example(vae64, direction, batch=1, grid=grid)
            self.check_sharded(vae64, direction, x, world, self.fp64_bound, destination=destination)

    @both_directions
    def test_sharded_in_float32_equals_whole(self, vae: VAE, direction: Direction) -> None:
        """Over one rank, and over as many as there are; the smallest grid, and a larger one."""
        for world in (1, 2, 3, 5):
            for grid in {self.latent_grids[0], self.latent_grids[-1]}:
                x = self.example(vae, direction, batch=1, grid=grid)
                self.check_sharded(vae, direction, x, world, self.fp32_bound)

    @both_directions
    def test_sharded_in_tiles_equals_whole(self, vae: VAE, direction: Direction) -> None:
        """Float32, item by item."""
        x = self.example(vae, direction)
        self.check_sharded(vae, direction, x, 2, self.fp32_bound, tile=(3,) * (x.ndim - 2), items=1)

    @both_directions
    def test_a_shared_stream_equals_the_whole(self, vae64: VAE, direction: Direction) -> None:
        """Only the destination gets pieces; or all are told that the network streams on one device."""
        for world, grid in zip((2, 3, 5), self.latent_grids[::-1], strict=False):
            x = self.example(vae64, direction, grid=grid)

            def call(group: object, x: Tensor = x) -> list[Tensor]:
                sharding = Sharding(group=group, destination=1, timeout=20)
                if direction == "decode":
                    return list(vae64.decode_stream(self.chunks(x), mesh=sharding))
                return [moments(posterior) for posterior in vae64.encode_stream(self.chunks(x), mesh=sharding)]

            assert vae64.shares_streams == self.shares_streams
            if not self.shares_streams:
                with pytest.raises(ConfigError, match="on one device"):
                    on_ranks(world, call)
                return
            pieces = on_ranks(world, call)
            assert [rank for rank, made in enumerate(pieces) if made] == [1]
            made = torch.cat(pieces[1], self.stream_axis)
            assert distance(made, self.run(vae64, direction, x)) <= self.fp64_bound

    @pytest.mark.slow
    @both_directions
    @pytest.mark.parametrize("double", [False, True])
    def test_any_sharding_equals_whole(self, vae: VAE, direction: Direction, double: bool) -> None:
        """Any grid on any number of ranks along any axis, in tiles and pieces of any size."""
        vae = vae.double() if double else vae
        bound = self.fp64_bound if double else self.fp32_bound

        @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(data=st.data())
        def check(data: st.DataObject) -> None:
            x = self.example(vae, direction, batch=1, grid=data.draw(st.sampled_from(self.latent_grids)))
            world = data.draw(st.sampled_from((1, 2, 3, 4, 5, 8)))
            axis = data.draw(st.sampled_from((None, *range(x.ndim - 2))))
            destination = data.draw(st.sampled_from((None, *range(world))))
            options: dict[str, object] = {"tile": data.draw(st.none() | tiles(largest_grid(vae, x, direction)))}
            chunk = self.plan(vae, direction, tuple(x.shape)).chunk
            if chunk is not None:
                options["chunk"] = data.draw(st.integers(1, chunk))
            self.check_sharded(vae, direction, x, world, bound, axis, destination, **options)

        check()

    def check_sharded(
        self,
        vae: VAE,
        direction: Direction,
        x: Tensor,
        world: int,
        bound: float,
        axis: int | None = None,
        destination: int | None = 0,
        **options: object,
    ) -> None:
        """Every rank has what it is to have of the result that one device makes."""
        whole = self.run(vae, direction, x)

        def call(group: object) -> tuple[Plan, Tensor]:
            sharding = Sharding(group=group, axis=axis, destination=destination, timeout=20)
            plan = self.plan(vae, direction, tuple(x.shape), mesh=sharding, **options)
            return plan, self.run(vae, direction, x, plan)

        for rank, (plan, made) in enumerate(on_ranks(world, call)):
            assert plan.sharding is not None
            assert plan.sharding.axis is not None
            size = whole.shape[2 + plan.sharding.axis]
            start, stop = (0, size) if rank == destination else plan.sharding.spans(size)[rank]
            expected = whole.narrow(2 + plan.sharding.axis, start, stop - start)
            assert made.shape == expected.shape
            assert made.numel() == 0 or distance(made, expected) <= bound, (rank, str(plan))

    @both_directions
    @pytest.mark.parametrize("destination", [None, 1])
    def test_ranks_share_blended_tiles(self, vae64: VAE, direction: Direction, destination: int | None) -> None:
        """More tiles than ranks, and a last round in which some have none: the bits of one device."""
        ratio = vae64.sample_axes[-1].up
        blend = Blend(name="small", pixels=3 * ratio, pixels_stride=2 * ratio)
        if not self.blends:
            x = self.example(vae64, direction, batch=1, grid=self.latent_grids[-1])
            with pytest.raises(ConfigError, match="has no blended tiles"):
                self.plan(vae64, direction, tuple(x.shape), blend=blend)
            return
        # Nine tiles, of which the last are narrower.
        x = self.example(vae64, direction, batch=2, grid=(*self.latent_grids[-1][:-2], 6, 6))
        plan = self.plan(vae64, direction, tuple(x.shape), blend=blend)
        whole, size = self.run(vae64, direction, x, plan), plan.output_shape[-1]

        def call(group: object) -> Tensor:
            sharding = Sharding(group=group, axis=x.ndim - 3, destination=destination, timeout=20)
            shared = self.plan(vae64, direction, tuple(x.shape), blend=blend, mesh=sharding)
            return self.run(vae64, direction, x, shared)

        for rank, made in enumerate(on_ranks(4, call)):
            start, stop = (0, size) if rank == destination else (size * rank // 4, size * (rank + 1) // 4)
            assert torch.equal(made, whole[..., start:stop])

    @both_directions
    def test_every_grid_can_be_tiled(self, vae64: VAE, direction: Direction) -> None:
        for grid in self.latent_grids:
            x = self.example(vae64, direction, batch=1, grid=grid)
            plan = self.plan(vae64, direction, tuple(x.shape), tile=(3,) * len(grid))
            assert distance(self.run(vae64, direction, x, plan), self.run(vae64, direction, x)) <= self.fp64_bound

    @both_directions
    @pytest.mark.parametrize("place", ["slabs", "anew"])
    def test_grids_can_lie_elsewhere(self, vae64: VAE, direction: Direction, place: Place) -> None:
        """In slabs, of which a part is on the host, or nowhere."""
        x = self.example(vae64, direction, batch=1)
        sizes = [axis.output_size(2) for axis in vae64.sample_axes]
        plan = self.plan(vae64, direction, tuple(x.shape), tile=sizes)
        steps = len(vae64._steps(direction))
        placed = replace(plan, places=(place,) * steps, host_shares=(0.4,) * steps)
        made, tiled = (self.run(vae64, direction, x, each) for each in (placed, plan))
        assert distance(made, tiled) <= self.fp64_bound

    @both_directions
    def test_tiling_can_be_configured(self, vae: VAE, direction: Direction) -> None:
        x = self.example(vae, direction)
        whole = self.run(vae, direction, x)
        vae.enable_tiling()
        plan = self.plan(vae, direction, tuple(x.shape))
        assert plan.mode == "tiled"
        assert plan.tile is not None
        assert distance(self.run(vae, direction, x), whole) <= self.fp32_bound
        vae.disable_tiling()
        assert self.plan(vae, direction, tuple(x.shape)).mode == "whole"

    @both_directions
    def test_a_plan_is_honoured(self, vae: VAE, direction: Direction) -> None:
        x = self.example(vae, direction, batch=3)
        shape = tuple(x.shape)
        options: list[dict[str, object]] = [{}, {"items": 1}, {"tile": (2,) * (x.ndim - 2)}]
        plans = [self.plan(vae, direction, shape, **option) for option in options]
        calls = [count_calls(vae, partial(self.run, vae, direction, x, plan)) for plan in plans]
        assert calls[1] == 3 * calls[0]
        assert calls[2] > 3 * calls[0]

    @both_directions
    def test_a_plan_prints(self, vae: VAE, direction: Direction) -> None:
        shape = tuple(self.example(vae, direction).shape)
        plan = self.plan(vae, direction, shape, tile=(17,) * (len(shape) - 2))
        text = str(plan)
        for part in (direction, " x ".join(map(str, shape)), "tiled", "17", "float32", "cpu", "predicted"):
            assert part in text
        assert plan.output_shape[2:] == self.run(vae, direction, self.example(vae, direction)).shape[2:]

    def test_a_plan_for_something_else_is_refused(self, vae: VAE) -> None:
        x, z = self.example(vae, "encode"), self.example(vae, "decode")
        plan = vae.plan_decode(tuple(z.shape))
        with pytest.raises(ConfigError, match="the plan is for"):
            vae.decode(z[:1], plan=plan)
        with pytest.raises(ConfigError, match="the plan is for"):
            vae.encode(x, plan=plan)
        with pytest.raises(ShapeError, match="tile"):
            vae.plan_decode(tuple(z.shape), tile=(4,) * z.ndim)

    @both_directions
    def test_a_budget_chooses_the_plan(self, vae: VAE, direction: Direction) -> None:
        shape = self.large(vae, direction)
        whole = self.plan(vae, direction, shape)
        roomy = self.plan(vae, direction, shape, memory_budget=whole.peak_bytes)
        assert (roomy.mode, roomy.items) == ("whole", shape[0])
        tight = self.plan(vae, direction, shape, memory_budget=whole.peak_bytes - 1)
        assert tight.peak_bytes < whole.peak_bytes
        assert (tight.mode, tight.items) != (whole.mode, whole.items)
        assert "budget" in str(tight)

    @pytest.mark.slow  # It searches everything there is.
    def test_a_budget_that_nothing_fits_says_the_least_that_does(self, vae: VAE) -> None:
        shape = self.large(vae, "decode")
        with pytest.raises(MemoryBudgetError, match=r"needs .* or more") as caught:
            vae.plan_decode(shape, memory_budget=1)
        least = re.search(r"needs ([\d.]+ ?[KMG]?i?B) or more", str(caught.value))
        assert least
        assert vae.plan_decode(shape, memory_budget=least[1])

    @both_directions
    def test_more_work_is_predicted_to_need_more_memory(self, vae: VAE, direction: Direction) -> None:
        peaks = [
            self.plan(vae, direction, tuple(self.example(vae, direction, batch, grid).shape)).peak_bytes
            for batch, grid in ((1, self.latent_grids[-1]), (2, self.latent_grids[-1]))
        ]
        shape = self.large(vae, direction)
        peaks += [self.plan(vae, direction, shape, items=items).peak_bytes for items in (1, 2)]
        assert peaks == sorted(peaks)
        assert len(set(peaks)) == len(peaks)

    def chunks(self, x: Tensor) -> Iterator[Tensor]:
        """The input of a stream in unequal pieces along the axis that streams."""
        sizes = [1, max(x.shape[self.stream_axis] - 1, 0)]
        return (piece for piece in x.split(sizes, self.stream_axis) if piece.shape[self.stream_axis])

    def stream(self, vae: VAE, direction: Direction, source: Tensor | Iterator[Tensor]) -> list[Tensor]:
        """The pieces that a stream gives."""
        if direction == "decode":
            return list(vae.decode_stream(source))
        return [moments(posterior) for posterior in vae.encode_stream(source)]

    def large(self, vae: VAE, direction: Direction) -> tuple[int, ...]:
        """A shape that is predicted, never computed, and large enough for a budget to choose tiles."""
        ratio = max(axis.up for axis in vae.sample_axes)
        z_shape = (2, vae.channels[1], *[-(-100 // ratio)] * len(vae.sample_axes))
        return z_shape if direction == "decode" else vae.decoded_shape(z_shape)


@st.composite
def tiles(draw: st.DrawFn, extent: Sequence[int]) -> tuple[int, ...]:
    """Extents of a tile, from a single element to more than the grid has, of which MOST_TILES cover the grid."""
    tile, left = [0] * len(extent), MOST_TILES
    for axis in draw(st.permutations(range(len(extent)))):
        least = -(-extent[axis] // left)
        tile[axis] = draw(st.integers(least, extent[axis] + 4))
        left = max(left // -(-extent[axis] // tile[axis]), 1)
    return tuple(tile)


def largest_grid(vae: VAE, x: Tensor, direction: Direction) -> tuple[int, ...]:
    """Sizes of the sample grid, which no grid inside the network exceeds."""
    return tuple((x.shape if direction == "encode" else vae.decoded_shape(x.shape))[2:])


def count_calls(vae: VAE, run: Callable[[], object]) -> int:
    """How often the layer that is called most is called."""
    counts: Counter[nn.Module] = Counter()
    handles = [
        module.register_forward_hook(lambda module, *_: counts.update([module]))
        for module in vae.modules()
        if module is not vae
    ]
    run()
    for handle in handles:
        handle.remove()
    return max(counts.values())
