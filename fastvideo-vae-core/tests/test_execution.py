"""Which plan a call takes by itself, how it goes on when memory runs out, and how it tells its progress."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fastvideo_vae_core.blending import Blend, blended_tiles
from fastvideo_vae_core.errors import ConfigError, MemoryBudgetError, ShardError
from fastvideo_vae_core.execution import free_bytes
from fastvideo_vae_core.plan import Plan
from fastvideo_vae_core.sharding import Sharding
from fastvideo_vae_core.testing.exhaustion import Exhaustion
from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_core.testing.ranks import on_ranks
from fastvideo_vae_core.testing.threads import single_thread
from fastvideo_vae_core.testing.toys import Toy, ToyAudio, ToyImage, ToyVideo, toy
from fastvideo_vae_core.units import Units

# Latents and tiles for more than twenty units, where smaller tiles save memory.
SIZES: dict[type[Toy], tuple[tuple[int, ...], tuple[int, ...]]] = {
    ToyImage: ((1, 4, 160, 160), (96, 96)),
    ToyVideo: ((1, 4, 5, 48, 48), (2, 72, 72)),
    ToyAudio: ((1, 4, 700), (128,)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.mark.parametrize("behind", range(20))
@pytest.mark.parametrize("family", SIZES, ids=lambda family: family.__name__)
class TestOutOfMemory:
    """In every unit up to the twentieth of a plan in tiles; the smaller plan has smaller ones."""

    def test_the_smaller_plan_gives_its_own_bits(self, family: type[Toy], behind: int) -> None:
        vae, (shape, tile) = toy(family).requires_grad_(False), SIZES[family]
        z = make_input("exhaustion", shape, "latent")
        plan = vae.plan_decode(shape, tile=tile)
        with Exhaustion(behind) as exhaustion, pytest.warns(UserWarning, match="ran out of memory"):
            made = vae.decode(z, plan=plan, progress=exhaustion.progress).sample
        first, again = exhaustion.live
        assert first == again
        begin = exhaustion.told.index((0, exhaustion.told[-1][1]), 1)
        assert behind < begin <= behind + 3
        assert torch.equal(made, vae.decode(z, plan=smaller(vae, plan)).sample)
        assert (made - vae.decode(z).sample).abs().max() <= 1e-5


def test_the_smaller_plan_takes_half_if_anything_does() -> None:
    vae, shape = toy(ToyImage).requires_grad_(False), (8, 4, 40, 40)
    plan = vae.plan_decode(shape)
    assert smaller(vae, plan) == vae.plan_decode(shape, memory_budget=plan.peak_bytes // 2)
    exhaustion = Exhaustion(0)
    with exhaustion, pytest.warns(UserWarning, match="1 of 8 at a time"):
        vae.decode(torch.zeros(shape), progress=exhaustion.progress)


def test_a_call_that_cannot_be_made_smaller_says_so() -> None:
    vae, z = toy(ToyImage), torch.zeros(1, 4, 8, 8)
    exhaustion = Exhaustion(0)
    with exhaustion, pytest.raises(MemoryBudgetError, match=r"on cpu \(whole, .* no smaller plan; pass") as caught:
        vae.decode(z, progress=exhaustion.progress)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_float16_that_overflows_behind_a_smaller_plan_stays_in_it() -> None:
    """The plan that memory was enough for is the one that is computed again."""
    vae = toy(ToyImage).half().requires_grad_(False)
    vae.config = replace(vae.config, fp16="retry")
    z = torch.full((2, 4, 8, 8), 6e4, dtype=torch.float16)
    exhaustion = Exhaustion(0)
    with exhaustion, pytest.warns(UserWarning, match="computed again") as told:
        vae.decode(z, progress=exhaustion.progress)
    assert ["memory" in str(each.message) for each in told] == [True, False]
    # One unit, of which nothing came; two items by themselves; and again in float32.
    assert exhaustion.told == [(0, 1), *[(0, 2), (1, 2), (2, 2)] * 2]


def test_an_error_of_the_caller_is_not_taken_for_memory() -> None:
    """Whatever progress raises goes through, once."""
    vae, told = toy(ToyImage), []

    def stop(*units: int) -> None:
        told.append(units)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vae.decode(torch.zeros(1, 4, 4, 4), progress=stop)
    assert told == [(0, 1)]


class OnSmallDevice(ToyImage):
    """A toy whose device says how much memory is free."""

    free: int | None = None
    predictions: ClassVar[int] = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.taken: list[Plan] = []

    def _free_bytes(self) -> int | None:
        return self.free

    def _compute(self, plan: Plan, x: Tensor, units: Units | None = None) -> Tensor:
        self.taken.append(plan)
        # By what has the weights' place in a rehearsal.
        OnSmallDevice.predictions += x.is_meta
        return super()._compute(plan, x, units)


class TestDefaultPlan:
    shape = (2, 4, 80, 80)

    def there(self, vae: OnSmallDevice) -> int:
        """Bytes of the weights and the input, which every prediction has in it."""
        return sum(each.nbytes for each in vae._half_parameters("decode")) + torch.zeros(self.shape).nbytes

    def small(self, free: int | None) -> OnSmallDevice:
        vae = toy(OnSmallDevice)
        assert isinstance(vae, OnSmallDevice)
        vae.free = free
        OnSmallDevice.predictions = 0
        return vae

    def took(self, vae: OnSmallDevice, **settings: Any) -> Plan:
        vae.decode(torch.zeros(self.shape), **settings)
        return vae.taken[-1]

    def test_everything_at_once_where_it_fits(self) -> None:
        vae = self.small(1 << 28)
        plan = self.took(vae)
        assert (plan.mode, plan.items, vae.predictions) == ("whole", 2, 1)
        assert "256.00 MiB free on cpu" in str(plan)
        assert self.took(self.small(None)).notes == ()

    def test_nothing_is_predicted_where_it_plainly_fits(self) -> None:
        vae = self.small(1 << 34)
        assert "many times the need" in str(self.took(vae).notes)
        assert vae.predictions == 0

    def test_what_is_there_already_is_not_counted_twice(self) -> None:
        """The prediction has the weights and the input in it."""
        vae = self.small(None)
        whole = vae.plan_decode(self.shape)
        vae.free = whole.peak_bytes - self.there(vae)
        assert self.took(vae).mode == "whole"
        assert self.took(vae).items == 2
        vae.free -= 1
        assert self.took(vae).items == 1

    def test_the_first_smaller_plan_that_fits_is_that_of_a_budget(self) -> None:
        vae = self.small(None)
        expected = vae.decode(torch.zeros(self.shape)).sample
        vae.free = vae.plan_decode(self.shape, items=1).peak_bytes - self.there(vae) - 1
        plan = self.took(vae)
        assert plan.mode == "tiled"
        assert "whole would need" in str(plan)
        assert plan == vae.plan_decode(self.shape, memory_budget="free")
        assert (vae.decode(torch.zeros(self.shape)).sample - expected).abs().max() <= 1e-5

    def test_the_same_call_is_predicted_once(self) -> None:
        vae = self.small(None)
        vae.free = vae.plan_decode(self.shape, items=1).peak_bytes - self.there(vae) - 1
        self.took(vae)
        predictions = vae.predictions
        self.took(vae)
        assert vae.predictions == predictions > 1

    def test_what_was_asked_for_is_done(self) -> None:
        vae = self.small(1)
        assert self.took(vae, plan=vae.plan_decode(self.shape)).mode == "whole"
        vae.enable_slicing()
        assert (plan := self.took(vae)).items == 1
        assert plan.mode == "whole"
        vae.disable_slicing()
        vae.enable_tiling()
        assert self.took(vae).tile == (4, 4)

    def test_nothing_that_fits_is_an_error_before_anything_is_computed(self) -> None:
        vae = self.small(1)
        with pytest.raises(MemoryBudgetError, match=r"needs .* or more.*free on cpu.*plan_decode makes"):
            vae.decode(torch.zeros(self.shape))
        assert not vae.taken


def test_free_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver has, and what PyTorch holds without using it; other devices than CUDA's cannot say."""
    held = {"reserved_bytes.all.current": 70, "allocated_bytes.all.current": 50}
    facts: dict[str, object] = {"mem_get_info": (100, 1000), "memory_stats": held}
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert free_bytes(torch.device("cuda")) == 120
    assert free_bytes(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert free_bytes(torch.device("cuda")) is None


class TestSeveralDevices:
    def test_every_rank_tells_its_own_units(self) -> None:
        vae, z = toy(ToyImage).requires_grad_(False), torch.zeros(1, 4, 9, 5)

        for tile in (None, (3, 4)):

            def call(group: object, tile: tuple[int, ...] | None = tile) -> list[tuple[int, int]]:
                told: list[tuple[int, int]] = []
                plan = vae.plan_decode(z.shape, tile=tile, mesh=Sharding(group=group, timeout=20))
                vae.decode(z, plan=plan, progress=lambda *units: told.append(units))
                return told

            for told in on_ranks(3, call):
                assert told == [(done, told[0][1]) for done in range(told[0][1] + 1)]

    def test_a_rank_that_is_stopped_ends_the_call_everywhere(self) -> None:
        vae, z = toy(ToyImage).requires_grad_(False), torch.zeros(1, 4, 9, 5)

        def call(group: Any) -> BaseException | None:
            def stop(done: int, total: int) -> None:
                if group.rank() == 1 and done == 1:
                    raise InterruptedError("enough")

            try:
                vae.decode(z, plan=vae.plan_decode(z.shape, mesh=Sharding(group=group, timeout=1)), progress=stop)
            except Exception as error:
                return error
            return None

        other, own = on_ranks(2, call)
        assert isinstance(own, InterruptedError)
        assert isinstance(other, ShardError)
        assert "rank 1 failed with InterruptedError: enough" in str(other)

    def test_out_of_memory_on_one_rank_is_an_error(self) -> None:
        """All have agreed on the plan."""
        vae, z = toy(ToyImage).requires_grad_(False), torch.zeros(1, 4, 9, 5)

        def call(group: Any) -> None:
            with Exhaustion(0) as exhaustion, warnings.catch_warnings():
                warnings.simplefilter("error")
                plan = vae.plan_decode(z.shape, mesh=Sharding(group=group, timeout=1))
                vae.decode(z, plan=plan, progress=exhaustion.progress)

        with pytest.raises(torch.OutOfMemoryError):
            on_ranks(1, call)


class TestBlend:
    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"pixels": 64}, "pixels and pixels_stride come together"),
            ({"pixels": 64, "pixels_stride": 24}, "pixels_stride must lie between half of pixels=64 and all of it"),
            ({"pixels": 64, "pixels_stride": 65}, "pixels_stride must lie between"),
            ({"pixels": 0, "pixels_stride": 0}, "pixels_stride must lie between"),
            ({"frames": 16, "frames_stride": 20}, "frames_stride must lie between"),
            ({"frames": 18, "frames_stride": 12}, "frames=18 and frames_stride=12 of tiles must be multiples of 4"),
            ({"pixels": 64, "pixels_stride": 36}, "pixels=64 and pixels_stride=36 of tiles must be multiples of 8"),
        ],
    )
    def test_geometry_that_makes_no_sense_is_refused(self, sizes: dict[str, int], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Blend(name="wrong", **sizes).check(4, 8)

    def test_pictures_have_no_frames(self) -> None:
        with pytest.raises(ConfigError, match="pictures have no frames"):
            Blend(name="clip", frames=16, frames_stride=12).check(None, 8)

    def test_a_family_without_blended_tiles_says_so(self) -> None:
        blend = Blend(name="any", pixels=64, pixels_stride=48)
        with pytest.raises(ConfigError, match="ToyImage has no blended tiles"):
            toy(ToyImage).plan_decode((1, 4, 8, 8), blend=blend)

    def test_tiles_do_not_depend_on_each_other(self) -> None:
        """They may be computed in any order and place, and are put together in theirs."""
        blend = Blend(name="any", frames=8, frames_stride=4, pixels=8, pixels_stride=6)
        x = make_input("blend", (1, 2, 14, 15, 13), "video")
        tiles = blended_tiles(x.shape, blend.cut("frames", "decode", 1), blend.cut("pixels", "decode", 1))
        assert len(tiles.crops) == 4 * 3 * 3
        backwards = {index: x[crop].clone() for index, crop in reversed(list(enumerate(tiles.crops)))}
        made = tiles.join(backwards[index] for index in range(len(tiles.crops)))
        # Of a function that sees single elements all tiles say the same where they overlap.
        assert made.shape == x[:, :, : made.shape[2]].shape
        assert (made - tiles.join(x[crop].clone() for crop in tiles.crops)).abs().max() == 0


def smaller(vae: Toy, plan: Plan) -> Plan:
    """What a budget of half makes of a plan, or else anything less."""
    options = {"tile": plan.tile, "items": plan.items}
    try:
        return vae.plan_decode(plan.input_shape, memory_budget=plan.peak_bytes // 2, **options)
    except MemoryBudgetError:
        return vae.plan_decode(plan.input_shape, memory_budget=plan.peak_bytes - 1, **options)
