"""Upsampling folded into the convolution behind it, against the two of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.ops import upsampling
from fastvideo_vae_core.ops.nearest import Nearest
from fastvideo_vae_core.ops.upsampling import folded, spread, upsampled2d
from fastvideo_vae_core.rehearsal import rehearsing
from fastvideo_vae_core.testing.parity import relative_error


@pytest.fixture
def conv() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 16, 3, padding=1).double().requires_grad_(False)


def a_grid(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 8, height, width, dtype=torch.float64, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (1, 1, 6), (3, 4, 1)], ids=str)
def test_equals_nearest_and_convolution(
    monkeypatch: pytest.MonkeyPatch, conv: nn.Conv2d, shape: tuple[int, int, int]
) -> None:
    x = a_grid(*shape)
    expected = conv(F.interpolate(x, scale_factor=2.0))
    assert torch.equal(upsampled2d(x, conv, Nearest()), expected)
    monkeypatch.setattr(upsampling, "_folds", lambda *_: True)
    made = upsampled2d(x, conv, Nearest())
    assert relative_error(made, expected) <= 1e-14
    assert made.stride(1) == 1


def test_one_axis_alone(conv: nn.Conv2d) -> None:
    """Rows stay, columns come twice; a bias is left out."""
    x = a_grid(2, 5, 7)
    made = spread(F.conv2d(x, folded(conv.weight, (1, 2)), None, 1, 1).movedim(1, -1), (1, 2), None).movedim(-1, 1)
    expected = F.conv2d(x.repeat_interleave(2, 3), conv.weight, None, 1, 1)
    assert relative_error(made, expected) <= 1e-14


def test_sums_of_taps_are_rounded_once(conv: nn.Conv2d) -> None:
    weight = conv.weight.float().contiguous(memory_format=torch.channels_last).bfloat16()
    exact = folded(weight.double(), (2, 2))
    assert torch.equal(folded(weight, (2, 2)), exact.bfloat16())
    assert folded(weight, (2, 2)).stride(1) == 1


def test_only_in_16_bits_on_a_gpu_without_gradients(monkeypatch: pytest.MonkeyPatch, conv: nn.Conv2d) -> None:
    monkeypatch.setattr(upsampling, "_TRITON", True)
    calls = []
    monkeypatch.setattr(upsampling, "folded", lambda *_: calls.append(1) or torch.empty(64, 8, 2, 2, device="meta"))
    meta = conv.to("meta").bfloat16()
    x = a_grid(1, 4, 4).to("meta", torch.bfloat16)
    plain = torch.empty(1, 8, 4, 4, device="meta", dtype=torch.bfloat16)

    def calls_of(x: Tensor, device: str) -> int:
        calls.clear()
        with rehearsing(torch.device(device)), torch.no_grad():
            upsampled2d(x.to(meta.weight.dtype), meta, Nearest())
        return len(calls)

    monkeypatch.setattr(F, "conv2d", lambda x, *_: torch.empty(1, 64, 5, 5, device="meta", dtype=x.dtype))
    assert calls_of(x, "cuda") == 1
    assert calls_of(plain, "cuda") == 0
    assert calls_of(x, "cpu") == 0
    meta.float()
    assert calls_of(x, "cuda") == 0
