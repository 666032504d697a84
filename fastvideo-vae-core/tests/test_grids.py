"""Grids in slabs, on the host, and computed anew: the same numbers, less memory, and plans that a budget finds."""

from __future__ import annotations

import contextlib
import gc
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core import budget
from fastvideo_vae_core.budget import Model
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import ConfigError, MemoryBudgetError
from fastvideo_vae_core.graphs import Captured
from fastvideo_vae_core.grids import Courier, Grid, Making, Place
from fastvideo_vae_core.memory import forecast
from fastvideo_vae_core.ops.norm import Moments, group_norm
from fastvideo_vae_core.testing.golden import fill
from fastvideo_vae_core.testing.toys import ToyArchConfig, ToyImage
from fastvideo_vae_core.tiling import POINTWISE, Axis, Step, run_steps

PLACES: tuple[Place, ...] = ("device", "slabs", "anew")
CONV = (Axis(before=1, after=1),) * 2


def seeded(shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Network(nn.Module):
    """A residual block behind norms over the whole grid, between a convolution and twice the resolution."""

    def __init__(self, channels: int = 4, last: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(2, channels) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(5))
        fill(self)
        self.double().requires_grad_(False)
        if last:
            self.to(memory_format=torch.channels_last)

    def steps(self) -> list[Step]:
        convs, norms = self.convs, self.norms

        def normed(index: int) -> Any:
            return lambda grids, moments: convs[index](group_norm(grids[0], norms[index - 1], moments))  # type: ignore[arg-type]

        def added(grids: Sequence[Tensor], moments: Moments | None) -> Tensor:
            return grids[1] + convs[2](group_norm(grids[0], norms[1], moments))  # type: ignore[arg-type, no-any-return]

        def up(grids: Sequence[Tensor], _: object) -> Tensor:
            return convs[3](grids[0].repeat_interleave(2, 2).repeat_interleave(2, 3))  # type: ignore[no-any-return]

        one, two, three = (each for each in norms)
        return [
            Step(name="in", run=lambda grids, _: convs[0](grids[0]), axes=CONV),
            Step(name="first", run=normed(1), axes=CONV, writes="residual", norm=one),  # type: ignore[arg-type]
            Step(name="second", run=added, axes=CONV, reads=("residual", "x"), norm=two),  # type: ignore[arg-type]
            Step(name="up", run=up, axes=(Axis(up=2, before=1, after=1),) * 2),
            Step(
                name="out",
                run=lambda grids, moments: convs[4](group_norm(grids[0], three, moments)),  # type: ignore[arg-type]
                axes=CONV,
                norm=three,  # type: ignore[arg-type]
            ),
        ]


@pytest.mark.parametrize(("tile", "last"), [((5, 14), False), ((5, 14), True), ((6, 5), False)], ids=str)
def test_places_change_no_number(tile: tuple[int, int], last: bool) -> None:
    steps, x = Network(last=last).steps(), seeded((1, 4, 8, 7))
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    on_device, whole = run_steps(steps, x, tile), run_steps(steps, x, (100, 100))
    for index, places in enumerate(itertools.product(PLACES, repeat=4)):
        made = run_steps(steps, x, tile, (*places, "device"), ((0.0, 0.3, 1.0)[index % 3],) * 5)
        assert float((made - whole).abs().max()) <= 1e-12
        if "anew" not in places:
            # Tiles are made of the same crops, wherever these come from.
            assert torch.equal(made, on_device)


def test_grids_go_without_being_collected() -> None:
    """What is in a circle of references stays until Python looks for those."""
    steps, x = Network().steps(), seeded((1, 4, 8, 7))

    def there() -> int:
        return sum(issubclass(type(each), (Grid, Making)) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = there()
        for places in (("device",) * 5, ("slabs", "anew", "slabs", "anew", "device")):
            run_steps(steps, x, (4, 14), places, (0.4,) * 5)
        assert there() == before
    finally:
        gc.enable()


def test_each_step_may_have_tiles_of_its_own() -> None:
    steps, x = Network().steps(), seeded((1, 4, 8, 7))
    whole = run_steps(steps, x, (100, 100))
    tiles = ((3, 7), (8, 7), (2, 7), (5, 14), (16, 14))
    for places in (("device",) * 5, ("slabs",) * 4 + ("device",), ("slabs", "anew", "slabs", "anew", "device")):
        made = run_steps(steps, x, (100, 100), places, (0.4,) * 5, tiles=tiles)
        assert float((made - whole).abs().max()) <= 1e-12


def test_a_step_that_trims_computes_less_of_the_same() -> None:
    """Two convolutions of a tile that goes on at both ends, and of those at the borders, which do not."""
    convs = [nn.Conv2d(4, 4, 3, padding=1).double().requires_grad_(False) for _ in range(3)]
    seen = Counter[tuple[bool, ...]]()

    def trimmed(
        grids: Sequence[Tensor], _: object, inner: tuple[bool, ...] = (False, False), *, conv: nn.Conv2d
    ) -> Tensor:
        seen[inner] += 1
        return F.conv2d(grids[0], conv.weight, conv.bias, padding=[0 if each else 1 for each in inner])

    plain, steps = (
        [Step(name="", run=partial(run, conv=conv), axes=CONV, trims=trims) for conv in convs]
        for run, trims in ((lambda grids, _, conv: conv(grids[0]), False), (trimmed, True))
    )
    x = seeded((1, 4, 24, 7))
    for places in (("device",) * 3, ("slabs", "anew", "device"), ("anew", "anew", "device")):
        seen.clear()
        expected = run_steps(plain, x, (4, 7), places, (0.5,) * 3)
        assert float((run_steps(steps, x, (4, 7), places, (0.5,) * 3) - expected).abs().max()) <= 1e-12
        assert set(seen) == {(False, False), (True, False)}
        assert seen[True, False] > seen[False, False]

    def work(steps: Sequence[Step]) -> float:
        for conv in convs:
            conv.to("meta")
        return forecast(lambda x: run_steps(steps, x, (4, 7)), x.shape, x.dtype).work

    # Of four tiles in the middle, of six rows.
    assert work(plain) - work(steps) == 3 * 4 * 2 * 7 * 4 * 36


def test_a_grid_that_no_norm_reads_and_one_that_is_read_twice() -> None:
    conv = nn.Conv1d(2, 2, 3, padding=1).double().requires_grad_(False)
    axis = (Axis(before=1, after=1),)
    steps = [
        Step(name="a", run=lambda grids, _: conv(grids[0]), axes=axis, writes="a"),
        Step(name="b", run=lambda grids, _: conv(grids[0]), axes=axis, reads=("a",), writes="b"),
        Step(name="c", run=lambda grids, _: grids[0] * grids[1], axes=(POINTWISE,), reads=("a", "b"), writes="c"),
        Step(name="d", run=lambda grids, _: conv(grids[0]) + conv(grids[1]), axes=axis, reads=("a", "c")),
    ]
    x = seeded((1, 2, 31))
    whole = run_steps(steps, x, (100,))
    for places in itertools.product(PLACES, repeat=3):
        assert float((run_steps(steps, x, (4,), (*places, "device"), (0.5,) * 4) - whole).abs().max()) <= 1e-12


class TestMemory:
    """What a rehearsal says of a chain of convolutions with a norm between them, by hand."""

    SIZE = (1, 4, 64, 64)
    UNIT = 4 * 64 * 64 * 4

    def peak(self, place: Place, share: float = 0.0, tile: int = 4) -> int:
        with torch.device("meta"):
            # The result is a quarter of a grid.
            convs = [nn.Conv2d(4, 4 if index < 5 else 1, 3, padding=1) for index in range(6)]
        steps = [
            Step(name=str(index), run=lambda grids, _, conv=conv: conv(grids[0]), axes=CONV)  # type: ignore[misc]
            for index, conv in enumerate(convs)
        ]
        places = (place,) * 6
        return forecast(lambda x: run_steps(steps, x, (tile, 64), places, (share,) * 6), self.SIZE, torch.float32).peak

    def test_a_grid_in_slabs_takes_the_place_of_the_one_before(self) -> None:
        # The input and two grids; or the input, one grid, and a few slabs of a sixteenth or the result.
        assert self.peak("device") >= 3 * self.UNIT
        assert 2 * self.UNIT < self.peak("slabs") <= 2.5 * self.UNIT

    def test_what_lies_on_the_host_does_not_count(self) -> None:
        input_and_result = 1.25 * self.UNIT
        assert input_and_result < self.peak("slabs", 1.0) <= input_and_result + 0.5 * self.UNIT

    def test_bytes_that_come_and_go_are_counted(self) -> None:
        with torch.device("meta"):
            conv = nn.Conv2d(4, 4, 3, padding=1)
        steps = [Step(name=str(index), run=lambda grids, _: conv(grids[0]), axes=CONV) for index in range(2)]
        seen = forecast(
            lambda x: run_steps(steps, x, (4, 64), ("slabs", "device"), (1.0, 0.0)), self.SIZE, torch.float32
        )
        assert seen.downloaded == self.UNIT
        # A row more at each side of 14 of the 16 slabs, and at one side of the others.
        assert seen.uploaded == self.UNIT * (64 + 30) / 64


class TestRecompute:
    def test_it_is_what_halos_add(self) -> None:
        vae = image()
        assert vae.plan_decode((1, 4, 16, 16)).recompute == 0.0
        steps = vae.plan_decode((1, 4, 16, 16), tile=(1 << 20, 1 << 20))
        assert abs(steps.recompute) < 1e-12
        small, large = (vae.plan_decode((1, 4, 64, 64), tile=(size, size)).recompute for size in (8, 32))
        assert small > large > 0.0

    def test_it_is_that_of_a_convolution_by_hand(self) -> None:
        with torch.device("meta"):
            conv = nn.Conv2d(4, 4, 3, padding=1)
        step = Step(name="conv", run=lambda grids, _: conv(grids[0]), axes=CONV)
        shape = (1, 4, 64, 64)
        whole = forecast(lambda x: run_steps([step], x, (64, 64)), shape, torch.float32).work
        assert whole == 64 * 64 * 4 * 4 * 9
        tiled = forecast(lambda x: run_steps([step], x, (4, 64)), shape, torch.float32).work
        assert tiled == whole * (64 + 30) / 64

    def test_the_model_of_a_search_says_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Of the multiplications, which are what a rehearsal counts.
        monkeypatch.setattr(budget, "_ASKING", 1e-12)
        vae = image()
        shape, tile = (1, 4, 64, 64), (32, 512)
        whole = vae.plan_decode(shape, tile=(1 << 20, 1 << 20)).forecast
        steps = whole.steps
        plan = vae.plan_decode(shape, tile=tile)
        model = Model(steps, (tile,) * len(steps))
        assert abs(model.time((), ()) / model.whole - plan.forecast.work / whole.work) < 0.02


class TestBudgets:
    """On shapes alone, for a GPU."""

    SHAPE = (1, 4, 512, 512)

    @pytest.mark.parametrize("share", [0.8, 0.45, 0.25])
    def test_a_plan_is_predicted_to_fit(self, share: float) -> None:
        vae = image("cuda")
        whole = vae.plan_decode(self.SHAPE)
        plan = vae.plan_decode(self.SHAPE, memory_budget=int(share * whole.peak_bytes))
        assert plan.peak_bytes <= share * whole.peak_bytes
        assert plan.mode == "tiled"
        assert "computed more than once" in str(plan)

    def test_the_least_is_less_than_tiles_can_do_with_whole_grids(self) -> None:
        vae = image("cuda")
        with pytest.raises(MemoryBudgetError, match="or more") as caught:
            vae.plan_decode(self.SHAPE, memory_budget=1)
        least = re.search(r"needs ([\d.]+ ?[KMG]?i?B) or more", str(caught.value))
        assert least
        plan = vae.plan_decode(self.SHAPE, memory_budget=least[1])
        assert any(place != "device" for place in plan.places)
        on_device = [vae.plan_decode(self.SHAPE, tile=(size,) * 2).peak_bytes for size in (64, 512)]
        assert plan.peak_bytes < min(on_device)

    def test_a_graph_does_not_wait_for_the_host(self) -> None:
        vae = image("cuda")
        plan = replace(vae.plan_decode(self.SHAPE), host_shares=(0.5,))
        with pytest.raises(ConfigError, match="one device alone"):
            Captured(vae, plan)

    def test_models_on_a_cpu_do_not_move_grids_where_they_are_already(self) -> None:
        vae = image("cpu")
        whole = vae.plan_decode(self.SHAPE)
        plan = vae.plan_decode(self.SHAPE, memory_budget=int(0.9 * whole.peak_bytes))
        assert not any(plan.host_shares)

    def test_a_placed_plan_runs(self) -> None:
        vae = image("cpu", meta=False)
        z = seeded((2, 4, 9, 10)).float()
        plan = vae.plan_decode(tuple(z.shape), tile=(16, 80), items=1)
        count = len(vae.decode_steps())
        placed = replace(plan, places=("slabs",) * count, host_shares=(0.4,) * count)
        assert torch.equal(vae.decode(z, plan=placed).sample, vae.decode(z, plan=plan).sample)


def image(device: str = "cpu", meta: bool = True) -> ToyImage:
    """The toy image autoencoder, which says that it is on that device."""
    where = torch.device(device)
    placed = type("Placed", (ToyImage,), {"device": where})
    with torch.device("meta" if meta else "cpu"):
        vae: ToyImage = placed(VAEConfig(arch_config=ToyArchConfig(width=32)))
    if not meta:
        fill(vae)
    return vae.eval().requires_grad_(False)


def test_a_plan_says_where_grids_are() -> None:
    plan = image("cuda").plan_decode((1, 4, 128, 128), tile=(32, 256))
    placed = replace(plan, places=("slabs", "anew", "device"), host_shares=(0.5, 0.0, 0.0))
    for text in ("1 in slabs (1 of them partly on the host)", "1 computed anew", "from the host", "MiB to it"):
        assert text in str(placed)
    assert "slabs" not in str(plan)


class Stream:
    """A stream that does what it is told at once."""

    def wait_stream(self, other: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self) -> object:
        return object()


@pytest.mark.parametrize("last", [False, True], ids=["plain", "channels-last"])
def test_the_way_of_a_gpu_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    """Crops that come a tile ahead, tiles that leave later, and copies block by block, without a GPU."""
    steps, x = Network(last=last).steps(), seeded((2, 4, 9, 8))
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    expected = run_steps(steps, x, (4, 5))
    make = Courier.__init__
    empty = torch.empty

    def on_gpu(self: Courier, device: torch.device, real: bool) -> None:
        make(self, device, real)
        self.ahead = self._asynchronous = True

    monkeypatch.setattr(Courier, "__init__", on_gpu)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **options: empty(*sizes, **options))
    for share in (0.0, 0.4, 1.0):
        places: tuple[Place, ...] = ("slabs", "slabs", "slabs", "slabs", "device")
        assert torch.equal(run_steps(steps, x, (4, 5), places, (share,) * 5), expected)
        mixed: tuple[Place, ...] = ("slabs", "anew", "slabs", "anew", "device")
        assert float((run_steps(steps, x, (4, 16), mixed, (share,) * 5) - expected).abs().max()) <= 1e-12
