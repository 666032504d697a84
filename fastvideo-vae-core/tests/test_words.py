"""Copies in words are copies: whatever gaps there are, wherever rows begin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvideo_vae_core.grids import dense
from fastvideo_vae_core.ops.words import copy_rows

small = st.integers(0, 3)


@given(
    channels=st.integers(1, 9),
    begin=small,
    offset=small,
    step=st.integers(1, 3),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_every_number_arrives_and_no_other(
    channels: int, begin: int, offset: int, step: int, dtype: torch.dtype
) -> None:
    source = torch.randn(4, 9, 12).to(dtype)[:, ::step, begin : begin + channels]
    held = torch.full((4, 9, 13), 7.0, dtype=dtype)
    into = held[:, : source.shape[1], offset : offset + channels]
    wanted = held.clone()
    wanted[:, : source.shape[1], offset : offset + channels] = source
    copy_rows(into, source)
    assert torch.equal(held, wanted)


def test_gradients_pass() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    into = torch.zeros_like(x)
    copy_rows(into, x)
    into.sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 1).all())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_part_without_gaps_keeps_numbers_and_layout(layout: torch.memory_format) -> None:
    x = torch.randn(1, 8, 3, 5, 4).bfloat16().contiguous(memory_format=layout)
    assert dense(x) is x
    part = x[:, :, :, 1:4]
    made = dense(part)
    assert torch.equal(made, part)
    assert made.is_contiguous(memory_format=layout)
    assert made.untyped_storage().nbytes() == part.nbytes
