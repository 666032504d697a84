"""The predictor of peak memory against cases worked out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastvideo_vae_core.errors import ConfigError
from fastvideo_vae_core.grids import Place
from fastvideo_vae_core.memory import (
    Forecast,
    Recalled,
    forecast,
    format_bytes,
    matrix_workspace,
    parse_bytes,
    predicted_peak,
    rehearsed_once,
    repeating,
    until_steady,
)
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.testing.toys import ToyImage, toy
from fastvideo_vae_core.tiling import Axis, Step, run_steps

X = (1, 4, 16, 16)
# Bytes of one tensor like X in float32.
UNIT = 4 * 16 * 16 * 4


@pytest.mark.parametrize(
    ("run", "units"),
    [
        (lambda x: x, 1),
        (lambda x: x + 1, 2),
        (lambda x: (x + 1) + 1, 3),
        (lambda x: x.add_(1), 1),
        (lambda x: x.view(4, -1).transpose(0, 1), 1),
        (lambda x: x.repeat(1, 2, 1, 1), 3),
        (lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), 5),
        (lambda x: torch.cat([x, x]), 3),
        (lambda x: (x.double(), None)[1], 3),
        (lambda x: F.silu(x, inplace=True), 1),
    ],
    ids=["input", "sum", "chain", "in place", "view", "repeat", "upsampled", "concatenated", "dropped", "silu"],
)
def test_live_tensors_at_the_worst_moment(run: object, units: int) -> None:
    assert predicted_peak(run, X, torch.float32) == units * UNIT  # type: ignore[arg-type]


def test_what_python_drops_is_released() -> None:
    def run(x: Tensor) -> Tensor:
        for _ in range(10):
            x = x + 1
        return x

    # The one before and the one that is being made.
    assert predicted_peak(run, X, torch.float32) == 2 * UNIT


def test_half_the_size_of_the_type_is_half_the_memory() -> None:
    assert predicted_peak(lambda x: x + 1, X, torch.float16) == UNIT


def test_attention_keeps_no_matrix_of_scores() -> None:
    shape = (1, 1, 4096, 8)
    one = 4096 * 8 * 4
    assert predicted_peak(lambda x: F.scaled_dot_product_attention(x, x, x), shape, torch.float32) == 2 * one


def test_a_residual_block_by_hand() -> None:
    with torch.device("meta"):
        conv, norm = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)

    def run(x: Tensor) -> Tensor:
        return conv(F.silu(norm(x), inplace=True)).add_(x)

    # The input, the normalised tensor and the convolution's result; and the moments of two groups.
    assert UNIT * 3 <= predicted_peak(run, X, torch.float32) <= UNIT * 3 + 64


def test_a_plan_counts_the_weights_of_its_half_and_of_a_copy_in_another_type() -> None:
    vae = toy(ToyImage, fp16="upcast")
    weights = sum(each.numel() for each in vae.decoder.parameters())
    small = (1, 4, 1, 1)
    activations = vae.plan_decode(small).peak_bytes - 4 * weights
    assert 0 < activations < 8192
    upcast = vae.half().plan_decode(small)
    assert upcast.dtype == torch.float32
    assert upcast.peak_bytes >= 2 * weights + 4 * weights + activations


@pytest.mark.parametrize(
    ("config", "capability", "size"),
    [
        (None, (9, 0), 32 << 20),
        (None, (8, 0), 8_519_680),
        (":4096:8", (8, 0), 32 << 20),
        (":4096:2:16:8", (9, 0), 8_519_680),
        ("", (9, 0), 32 << 20),
    ],
)
def test_the_workspace_of_matrix_products(
    config: str | None, capability: tuple[int, int], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    # Newer versions say it themselves.
    monkeypatch.delattr(torch.backends.cuda, "cublas_workspace_size", raising=False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", config)
    assert matrix_workspace(torch.device("cuda")) == size
    assert matrix_workspace(torch.device("cpu")) == 0


def test_small_tiles_need_less_than_the_whole() -> None:
    vae = toy(ToyImage)
    peaks = [vae.plan_decode((1, 4, 128, 128), tile=tile).peak_bytes for tile in (None, (64, 64), (32, 32))]
    assert peaks == sorted(peaks, reverse=True)
    # The tiled plan still holds the grids on both sides of a step; less than the normalised copy must have gone.
    assert peaks[-1] < 0.9 * peaks[0]


class TestWhatIsRehearsedOnce:
    """What rehearsals remember says the same as doing it again."""

    CONV, WIDE = (nn.Conv2d(4, 4, 3, padding=1, device="meta") for _ in range(2))

    def steps(self, ran: list[str]) -> list[Step]:
        conv, wide = self.CONV, self.WIDE
        left: list[Tensor] = []

        def plain(grids: Sequence[Tensor], _: object) -> Sum:
            ran.append("plain")
            return Sum(conv(grids[0]), grids[0][:, :, :], conv.bias)

        def leaving(grids: Sequence[Tensor], _: object) -> Tensor:
            ran.append("leaving")
            if not left:
                left.append(wide.weight.repeat(8, 8, 8, 8))
            return wide(grids[0] + 1)

        axes = (Axis(before=1, after=1),) * 2
        return [
            Step(name="plain", run=plain, axes=axes),
            Step(name="leaving", run=leaving, axes=axes),
            Step(name="plain again", run=plain, axes=axes, writes="y"),
            Step(name="both", run=lambda grids, _: grids[0] * grids[1], axes=(Axis(),) * 2, reads=("y", "x")),
        ]

    def seen(self, ran: list[str], places: tuple[Place, ...], recalled: Recalled | None) -> Forecast:
        steps, weights = self.steps(ran), [*self.CONV.parameters(), *self.WIDE.parameters()]

        def run(x: Tensor) -> Tensor:
            with repeating(steps) if recalled is not None else nullcontext():
                return run_steps(steps, x, (5, 64), places, (0.4,) * 4)

        found = forecast(run, (1, 4, 64, 64), torch.float32, torch.device("cuda"), weights, recalled)
        return replace(found, steps=[(each.made, each.peak, each.work, each.kept) for each in found.steps])

    def test_it_takes_the_same(self) -> None:
        recalled, ran, again = Recalled(), list[str](), list[str]()
        for places in itertools.product(("device", "slabs", "anew"), repeat=3):
            all_ = (*places, "device")
            assert self.seen(ran, all_, recalled) == self.seen(again, all_, None)
        # The sizes of a crop at the top, in between and at the bottom; and where weights are left, once for each of 27.
        assert ran.count("plain") < 40 < again.count("plain")
        assert 27 <= ran.count("leaving") < 60 < again.count("leaving")

    def test_outside_of_a_rehearsal_all_is_done(self) -> None:
        part, x = object(), torch.ones(3)
        with repeating([part]):
            assert [float(rehearsed_once(part, lambda by: x.sum() * by, [x], by)) for by in (1, 1, 2)] == [3, 3, 6]


def test_what_leaves_the_state_as_it_was_stands_for_those_that_follow() -> None:
    def run(x: Tensor) -> list[tuple[int, int]]:
        done = list[tuple[int, int]]()
        for item, times in until_steady([5, 5, 5, 5, 5, 5, 5, 2], lambda item: item, lambda: min(len(done), 3)):
            done.append((item, times))
        found.append(done)
        return done

    found: list[list[tuple[int, int]]] = []
    forecast(run, X, torch.float32)
    run(torch.zeros(X))
    assert found == [[(5, 1), (5, 1), (5, 1), (5, 1), (5, 3), (2, 1)], [(5, 1)] * 7 + [(2, 1)]]


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            (17, 17),
            ("17", 17),
            ("17B", 17),
            ("1KiB", 1024),
            ("1.5 GiB", 3 << 29),
            ("6gib", 6 << 30),
            ("500MB", 500_000_000),
            ("2 kB", 2000),
            ("0.5MiB", 1 << 19),
        ],
    )
    def test_they_are_read(self, text: int | str, size: int) -> None:
        assert parse_bytes(text) == size

    @pytest.mark.parametrize("text", ["", "GiB", "6 bananas", "6TiBs", "six GiB", "1e99999GiB", "nan GiB", "-"])
    def test_others_are_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match="is no size in bytes"):
            parse_bytes(text)

    @given(st.integers(0, 1 << 44))
    def test_what_is_printed_is_enough_and_at_most_a_hundredth_of_a_unit_more(self, size: int) -> None:
        printed = format_bytes(size)
        assert size <= parse_bytes(printed) <= size + parse_bytes(f"0.01{printed.split()[1]}") + 1
