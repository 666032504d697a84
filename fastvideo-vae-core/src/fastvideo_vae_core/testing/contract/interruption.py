"""What a call says on its way, and what becomes of it where it is stopped, or where memory runs out."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from fastvideo_vae_core.errors import MemoryBudgetError
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.testing.contract.calls import Interrupted, remember, state_of
from fastvideo_vae_core.testing.contract.hooks import VAE, Hooks, both_directions, distance, moments
from fastvideo_vae_core.testing.exhaustion import Exhaustion
from fastvideo_vae_core.units import Progress


class InterruptionContract(Hooks):
    """Progress is told unit by unit; an end before the end leaves nothing behind."""

    @both_directions
    def test_progress_is_told_between_all_units(self, vae: VAE, direction: Direction) -> None:
        x = self.example(vae, direction)
        totals = []
        for plan in self.plans(vae, direction, x):
            told: list[tuple[int, int]] = []
            made = self.watched(vae, direction, x, plan, lambda *units: told.append(units))  # noqa: B023
            total = told[0][1]
            assert told == [(done, total) for done in range(total + 1)], str(plan)
            assert torch.equal(made, self.run(vae, direction, x, plan))
            totals.append(total)
        whole, by_item, tiled, *_ = totals
        assert by_item == 2 * whole
        assert tiled > whole

    @both_directions
    def test_what_progress_raises_ends_the_call_and_leaves_nothing_behind(self, vae: VAE, direction: Direction) -> None:
        x = self.example(vae, direction)
        for plan in self.plans(vae, direction, x):
            expected, before = self.run(vae, direction, x, plan), state_of(vae)
            made: list[weakref.ref[Tensor]] = []
            handles = [each.register_forward_hook(partial(remember, made)) for each in vae.modules() if each is not vae]

            def stop(done: int, total: int) -> None:
                if done == total // 2 + 1:
                    raise Interrupted

            with pytest.raises(Interrupted):
                self.watched(vae, direction, x, plan, stop)
            for handle in handles:
                handle.remove()
            assert state_of(vae) == before
            assert not [tensor.shape for each in made if (tensor := each()) is not None]
            assert torch.equal(self.run(vae, direction, x, plan), expected)

    # Both directions go the same way, and it takes seconds.
    @pytest.mark.parametrize("direction", [pytest.param("encode", marks=pytest.mark.slow), "decode"])
    def test_out_of_memory_is_answered_by_a_smaller_plan(self, vae: VAE, direction: Direction) -> None:
        x = self.example(vae, direction)
        whole = self.run(vae, direction, x)
        for plan in self.plans(vae, direction, x):
            smaller = self.smaller(vae, plan)
            told: list[tuple[int, int]] = []
            self.watched(vae, direction, x, plan, lambda *units: told.append(units))  # noqa: B023
            self.check_exhausted(vae, direction, x, plan, smaller, told[0][1] // 2, whole)

    def check_exhausted_everywhere(
        self, vae: VAE, direction: Direction, grid: tuple[int, ...], **options: object
    ) -> None:
        """Memory runs out in each of the first twenty units of a plan with these options."""
        x = self.example(vae, direction, grid=grid)
        plan, whole = self.plan(vae, direction, tuple(x.shape), **options), self.run(vae, direction, x)
        smaller = self.smaller(vae, plan)
        assert smaller is not None
        for behind in range(20):
            self.check_exhausted(vae, direction, x, plan, smaller, behind, whole)

    def check_exhausted(
        self,
        vae: VAE,
        direction: Direction,
        x: Tensor,
        plan: Plan,
        smaller: Plan | None,
        behind: int,
        whole: Tensor,
    ) -> None:
        """Memory runs out behind so many units of a plan, and the call goes on as the smaller one does alone."""
        before = state_of(vae)
        known = [x, *vae.parameters(), *vae.buffers()]
        with torch.no_grad(), Exhaustion(behind, known=known) as exhaustion:
            if smaller is None:
                with pytest.raises(MemoryBudgetError, match="no smaller plan") as caught:
                    self.watched(vae, direction, x, plan, exhaustion.progress)
                assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
                return
            with pytest.warns(UserWarning, match="ran out of memory on cpu .* computed again with less"):
                made = self.watched(vae, direction, x, plan, exhaustion.progress)
        assert state_of(vae) == before
        first, again = exhaustion.live
        assert first == again
        told = exhaustion.told
        begin = told.index((0, told[-1][1]), 1)
        # A unit without a layer has nothing to run out in.
        assert begin > behind
        assert told[:begin] == [(done, told[0][1]) for done in range(begin)]
        assert told[begin:] == [(done, told[-1][1]) for done in range(told[-1][1] + 1)]
        assert torch.equal(made, self.run(vae, direction, x, smaller))
        assert distance(made, whole) <= self.fp32_bound

    @both_directions
    def test_out_of_memory_twice_is_an_error_that_says_the_way_out(self, vae: VAE, direction: Direction) -> None:
        x = self.example(vae, direction)
        plan = next(plan for plan in self.plans(vae, direction, x) if self.smaller(vae, plan) is not None)
        with (
            Exhaustion(0, times=2) as exhaustion,
            pytest.warns(UserWarning, match="ran out of memory"),
            pytest.raises(MemoryBudgetError, match=r"again with less .* memory_budget") as caught,
        ):
            self.watched(vae, direction, x, plan, exhaustion.progress)
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)

    @both_directions
    def test_out_of_memory_can_be_left_to_the_caller(self, vae: VAE, direction: Direction) -> None:
        x = self.example(vae, direction)
        vae.config = replace(vae.config, out_of_memory="raise")
        with Exhaustion(0) as exhaustion, warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(torch.OutOfMemoryError):
                self.watched(vae, direction, x, None, exhaustion.progress)

    def plans(self, vae: VAE, direction: Direction, x: Tensor) -> Iterator[Plan]:
        """The whole at once, item by item, in tiles and, where there are pieces of frames, in the shortest."""
        shape = tuple(x.shape)
        yield (whole := self.plan(vae, direction, shape))
        yield self.plan(vae, direction, shape, items=1)
        yield self.plan(vae, direction, shape, tile=(3,) * (x.ndim - 2))
        if whole.chunk is not None:
            yield self.plan(vae, direction, shape, chunk=1)

    def smaller(self, vae: VAE, plan: Plan) -> Plan | None:
        """What a budget below the plan's makes of it: half, or else anything less."""
        options = {"tile": plan.tile, "items": plan.items, "chunk": plan.chunk}
        for budget in (plan.peak_bytes // 2, plan.peak_bytes - 1):
            try:
                return self.plan(vae, plan.direction, plan.input_shape, memory_budget=budget, **options)
            except MemoryBudgetError:
                continue
        return None

    def watched(self, vae: VAE, direction: Direction, x: Tensor, plan: Plan | None, progress: Progress) -> Tensor:
        """As `run`, with progress."""
        if direction == "decode":
            return vae.decode(x, plan=plan, progress=progress).sample
        return moments(vae.encode(x, plan=plan, progress=progress).latent_dist)
