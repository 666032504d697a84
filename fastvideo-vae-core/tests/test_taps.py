"""Convolutions as sums of matrix products: the same numbers, and when they are taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo_vae_core.memory import predicted_peak
from fastvideo_vae_core.ops import taps
from fastvideo_vae_core.ops.causal import Cache, CausalConv3d
from fastvideo_vae_core.ops.clip import CausalConv, Clip, Pointwise, Run, convolved
from fastvideo_vae_core.testing.parity import relative_error

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("innermost", [False, True], ids=["plain", "channels innermost"])
@pytest.mark.parametrize(
    ("conv", "sizes"),
    [
        (nn.Conv1d(5, 6, 7, bias=False), (60,)),
        (nn.Conv2d(5, 6, 3, bias=False), (9, 7)),
        (nn.Conv3d(5, 6, 3, bias=False), (5, 9, 7)),
        (nn.Conv3d(5, 6, (3, 1, 1), bias=False), (3, 9, 7)),
        (nn.Conv2d(5, 6, (1, 3), bias=False), (4, 5)),
    ],
    ids=str,
)
def test_products_are_the_convolution(conv: Any, sizes: tuple[int, ...], innermost: bool) -> None:
    conv, x = conv.double(), torch.randn(2, 5, *sizes, dtype=torch.float64)
    given = x.movedim(1, -1).contiguous().movedim(-1, 1) if innermost else x
    y = taps.convolved(given, conv.weight)
    assert relative_error(y, conv(x)) <= 1e-15
    assert (y.stride(1) == 1) == innermost


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 2, 2), (2, 1, 3)])
def test_products_of_every_other_position_are_the_strided_convolution(stride: tuple[int, int, int]) -> None:
    conv, x = nn.Conv3d(3, 6, 3, stride, bias=False).double(), torch.randn(2, 3, 6, 9, 8, dtype=torch.float64)
    y = taps.strided(x, conv.weight, stride)
    assert y.is_contiguous()
    assert relative_error(y, conv(x)) <= 1e-15


@pytest.mark.parametrize("innermost", [False, True], ids=["plain", "channels innermost"])
@pytest.mark.parametrize("rows", [1, 3, 100], ids="{} rows".format)
@pytest.mark.parametrize(("kernel", "padding"), [((3, 3), (1, 1)), ((2, 2), (1, 0)), ((1, 3), (0, 2))], ids=str)
def test_strips_are_the_convolution(
    kernel: tuple[int, int], padding: tuple[int, int], rows: int, innermost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strips of rows, and where pictures are smaller than a strip, several of them at a time."""
    layer = nn.Conv2d(5, 6, kernel, padding=padding).double()
    x = torch.randn(4, 5, 11, 7, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if innermost else x
    monkeypatch.setattr(taps, "_STRIP", rows * 8 * 11 * (7 + 2 * padding[1]))
    for bias in (layer.bias, None):
        y = taps.in_strips(x, layer.weight, bias, padding)
        assert relative_error(y, nn.functional.conv2d(x, layer.weight, bias, 1, padding)) <= 1e-15
        assert y.is_contiguous(memory_format=torch.channels_last if innermost else torch.contiguous_format)


def test_strips_take_little_memory_beside_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.empty(64, 64, 3, 3, device="meta")
    shape, numbers = (2, 64, 100, 100), 2 * 64 * 100 * 100
    monkeypatch.setattr(taps, "_STRIP", 4 * 2 * numbers // 20)
    peak = predicted_peak(lambda x: taps.in_strips(x, weight, None, (1, 1)), shape, torch.float32)
    assert 2 * numbers <= peak / 4 <= 2.2 * numbers + 2 * weight.numel()


def test_every_position_is_the_same_among_any_others() -> None:
    """Where cuDNN would choose another algorithm for another number of frames."""
    conv, x = nn.Conv3d(5, 6, 3, bias=False).double(), torch.randn(1, 5, 9, 6, 7, dtype=torch.float64)
    whole = taps.convolved(x, conv.weight)
    parts = [taps.convolved(x[:, :, start : start + 3], conv.weight) for start in range(7)]
    assert relative_error(torch.cat(parts, 2), whole) <= 1e-15


def test_only_wide_layers_in_float32_on_a_gpu_without_tf32() -> None:
    wide, narrow = nn.Conv2d(128, 128, 3), nn.Conv2d(128, 96, 3)
    x = torch.empty(1, 128, 4, 4)
    assert taps.takes(GPU, x, wide)
    assert not taps.takes(CPU, x, wide)
    assert not taps.takes(GPU, x, narrow)
    assert not taps.takes(GPU, x.double(), wide)
    assert not taps.takes(GPU, x.bfloat16(), wide)
    assert not taps.takes(GPU, x, nn.Conv2d(128, 128, 1))
    assert not taps.takes(GPU, x, nn.Conv2d(128, 128, 3, stride=2))
    assert not taps.takes(GPU, x, nn.Conv2d(128, 128, 3, dilation=2), any_shape=True)
    for other in (narrow, nn.Conv2d(128, 128, 3, stride=2), nn.Conv2d(128, 128, 1)):
        assert taps.takes(GPU, x, other, any_shape=True)
        assert not taps.takes(CPU, x, other, any_shape=True)
    with torch.enable_grad():
        assert not taps.takes(GPU, x, wide)
    torch.backends.cudnn.allow_tf32 = True
    assert not taps.takes(GPU, x, wide)


def test_pictures_that_are_worth_a_launch_for_each_tap() -> None:
    weight = torch.empty(512, 512, 3, 3, device="meta")
    assert taps.worth(torch.empty(1, 512, 32, 32, device="meta"), weight)
    assert not taps.worth(torch.empty(1, 512, 16, 16, device="meta"), weight)
    assert taps.worth(torch.empty(4, 512, 16, 16, device="meta"), weight)


def test_no_memory_but_the_result_and_the_weights_in_order() -> None:
    conv = nn.Conv3d(64, 64, 3, device="meta")

    def run(x: Tensor) -> Tensor:
        return taps.convolved(x, conv.weight)

    shape = (1, 64, 6, 20, 20)
    numbers = 2 * 64 * 6 * 20 * 20 + 2 * conv.weight.numel()
    assert predicted_peak(run, shape, torch.float32) <= 4 * numbers + 4 * 512


def test_the_layers_that_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind zeros, behind a reflection, and with repeated borders, in pieces; with their biases."""
    x = torch.randn(2, 130, 5, 4, 6, dtype=torch.float64)
    layers = [CausalConv3d(130, 7), CausalConv3d(130, 7, edge="copies", ahead=1, border="reflect")]
    clipped = [CausalConv(130, 7).double(), CausalConv(130, 7, stride=(2, 1, 2)).double()]
    linear = Pointwise(130, 7).double()

    def computed() -> list[Tensor]:
        made = []
        for layer in layers:
            cache, parts = Cache(CPU), []
            for start in (0, 2):
                cache.last = start == 2
                parts.append(layer.double()(x[:, :, start : start + 2 + start], cache))
            made.append(torch.cat(parts, 2))
        run = Run(CPU, 2 * 130 * 4 * 6)
        return [*made, *(Clip(list(convolved(Clip([x]), each, run))).joined() for each in clipped), linear(x)]

    expected = computed()
    monkeypatch.setattr(taps, "takes", lambda device, x, conv, **_: True)
    for made, exact in zip(computed(), expected, strict=True):
        assert relative_error(made, exact) <= 1e-14
