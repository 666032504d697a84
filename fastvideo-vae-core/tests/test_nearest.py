"""Nearest neighbours in every layout and type."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvideo_vae_core.ops.nearest import Nearest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_equals_interpolate_and_keeps_the_layout(
    layout: torch.memory_format, channels: int, dtype: torch.dtype
) -> None:
    x = torch.randn(2, channels, 3, 5, dtype=dtype).contiguous(memory_format=layout)
    y = Nearest()(x)
    assert torch.equal(y, F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert y.is_contiguous(memory_format=layout)


def test_a_part_of_a_grid_and_gradients() -> None:
    x = torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    part = x[:, :, 1:4, 2:5]
    assert torch.equal(Nearest()(part.detach()), F.interpolate(part.detach(), scale_factor=2.0))
    Nearest()(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 4.0))  # type: ignore[arg-type]
