"""Attention of the middle blocks."""

from __future__ import annotations

import pytest
import torch

from fastvideo_vae_core.ops.attention import FrameCausalAttention, GridAttention
from fastvideo_vae_core.rehearsal import rehearsing

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", [GridAttention, FrameCausalAttention])
def test_the_layout_stays_on_a_gpu(kind: type[GridAttention], batch: int) -> None:
    """What follows a plain grid is plain: in float32 channels-last convolutions take other memory than predicted."""
    attention = kind(8, 2).requires_grad_(False).half().to("meta")
    x = torch.empty(batch, 8, *(2, 3, 4)[-2 if kind is GridAttention else -3 :], dtype=torch.float16, device="meta")
    with rehearsing(torch.device("cuda")):
        plain, last = attention(x), attention(x.contiguous(memory_format=LAYOUTS[x.ndim]))
    assert plain.stride() == x.stride()
    assert last.is_contiguous(memory_format=LAYOUTS[x.ndim])
    assert not last.is_contiguous()
