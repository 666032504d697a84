"""The predictor of peak memory against cases worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastvideo_vae_core.errors import ConfigError
from fastvideo_vae_core.memory import format_bytes, matrix_workspace, parse_bytes, predicted_peak
from fastvideo_vae_core.testing.toys import ToyImage, toy

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
