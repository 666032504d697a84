"""Attention of the middle blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo_vae_core.memory import forecast
from fastvideo_vae_core.ops import attention as module
from fastvideo_vae_core.ops.attention import FrameCausalAttention, GridAttention, attention, in_blocks
from fastvideo_vae_core.rehearsal import rehearsing

GPU = torch.device("cuda")
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", [GridAttention, FrameCausalAttention])
def test_the_layout_stays_on_a_gpu(kind: type[GridAttention], batch: int) -> None:
    """What follows a plain grid is plain: in float32 channels-last convolutions take other memory than predicted."""
    block = kind(8, 2).requires_grad_(False).half().to("meta")
    x = torch.empty(batch, 8, *(2, 3, 4)[-2 if kind is GridAttention else -3 :], dtype=torch.float16, device="meta")
    with rehearsing(GPU):
        plain, last = block(x), block(x.contiguous(memory_format=LAYOUTS[x.ndim]))
    assert plain.stride() == x.stride()
    assert last.is_contiguous(memory_format=LAYOUTS[x.ndim])
    assert not last.is_contiguous()


# Queries and keys with their leading axes, and the bytes and keys of a block: one block, cuts of queries alone and
# of both, several items in a block, and both, with fewer keys in the last row.
CASES = {
    "one block": ((1, 1), 300, 300, {}),
    "cut queries": ((1, 1), 700, 300, {"scores": 128 * 4 * 320}),
    "cut twice": ((2, 1), 700, 1000, {"scores": 128 * 4 * 256, "row": 256}),
    "items together": ((5, 3), 100, 257, {"scores": 4 * 100 * 4 * 320}),
    "items and cut keys": ((4, 1), 60, 1000, {"scores": 3 * 60 * 4 * 128, "row": 128}),
}


class TestBlocks:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", CASES)
    def test_they_are_as_close_to_float64_as_the_fused_kernel(self, case: str, dtype: torch.dtype) -> None:
        leading, queries, keys, sizes = CASES[case]
        torch.manual_seed(0)
        q = 2 * torch.randn(*leading, queries, 320, dtype=dtype)
        k, v = torch.randn(2, *leading, keys, 320, dtype=dtype)
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        ours, fused = in_blocks(q, k, v, **sizes), F.scaled_dot_product_attention(q, k, v)
        assert ours.shape == exact.shape
        assert ours.dtype == dtype
        # Which of two sums of the same rounded numbers is closer is chance, by a few hundredths.
        assert distance(ours, exact) < 1.03 * distance(fused, exact)

    def test_larger_scores_may_come_late(self) -> None:
        """What was added up relative to another maximum is scaled down, to nothing if it must be."""
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 1, 1, 512, 320)
        for growth in (1.0, 40.0):
            k = k * torch.linspace(0.1, growth, 512)[:, None]
            exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
            assert distance(in_blocks(q, k, v, row=64), exact) < 1e-5

    def test_sums_do_not_overflow_in_float16(self) -> None:
        q, k = torch.zeros(2, 1, 1, 2048, 320, dtype=torch.float16)
        v = torch.full_like(k, 100.0)
        assert torch.equal(in_blocks(q, k, v), v)
        assert torch.equal(in_blocks(q, k, v, row=512), v)

    @pytest.mark.parametrize("row", [64, 512])
    def test_infinity_does_not_hide(self, row: int) -> None:
        q, k, v = torch.randn(3, 1, 1, 512, 320)
        q[0, 0, 3, 7] = torch.inf
        made = in_blocks(q, k, v, row=row)
        assert made[0, 0, 3].isnan().all()
        assert made[0, 0, :3].isfinite().all()

    @pytest.mark.parametrize("kind", [GridAttention, FrameCausalAttention])
    def test_modules_and_their_excerpts_go_through_them(
        self, kind: type[GridAttention], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.manual_seed(0)
        block = kind(64, 4).requires_grad_(False)
        x = torch.randn(2, 64, *(3, 6, 8)[-2 if kind is GridAttention else -3 :])
        region = (slice(1, 3), slice(2, 5), slice(0, 8))[-x.ndim + 2 :]
        fused = block(x), block.excerpt(x, region)
        asked = []

        def few(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            asked.append(k.shape[-2])
            return in_blocks(q, k, v, scores=1, row=64)

        monkeypatch.setattr(module, "_is_wide", lambda q, k, v: True)
        monkeypatch.setattr(module, "in_blocks", few)
        for ours, theirs in zip((block(x), block.excerpt(x, region)), fused, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert asked == ([48, 48] if kind is GridAttention else [48, 96, 144, 96, 144])

    def test_a_rehearsal_counts_their_scores_and_the_same_products(self) -> None:
        shape = (1, 1, 16384, 512)
        seen = forecast(lambda x: attention(x, x, x), shape, torch.bfloat16, GPU)
        elsewhere = forecast(lambda x: attention(x, x, x), shape, torch.bfloat16)
        assert seen.work == elsewhere.work == 2 * 16384**2 * 512
        # Queries and result; then 2048 rows of scores, of what they mix to in float32, and of three numbers each.
        assert elsewhere.peak == 2 * 16384 * 512 * 2
        assert seen.peak - elsewhere.peak == 2048 * 4 * (16384 + 512 + 3)

    @pytest.mark.parametrize("positions", [8192, 16384, 65536, 120384])
    @pytest.mark.parametrize("items", [1, 21])
    def test_they_take_little_memory_at_any_size(self, positions: int, items: int) -> None:
        shape = (items, 1, positions, 512)
        peaks = [
            forecast(lambda x: attention(x, x, x), shape, torch.bfloat16, device).peak
            for device in (GPU, torch.device("cpu"))
        ]
        assert 0 < peaks[0] - peaks[1] < 144 << 20

    @pytest.mark.parametrize(
        ("change", "wide"),
        [
            ({}, True),
            ({"dtype": torch.float16}, True),
            ({"dtype": torch.float32}, False),
            ({"channels": 384}, False),
            ({"channels": 1024, "keys": 1024}, True),
            ({"keys": 8184}, False),
            ({"keys": 8193}, False),
            ({"queries": 1}, True),
            ({"gradient": True}, False),
            ({"device": torch.device("cpu")}, False),
        ],
        ids=str,
    )
    def test_who_goes_through_them(self, change: dict[str, Any], wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_TRITON", True)
        options = {"dtype": torch.bfloat16, "channels": 512, "keys": 8192, "queries": 1024} | change
        make = {"dtype": options["dtype"], "device": "meta", "requires_grad": "gradient" in change}
        q = torch.empty(1, 1, options["queries"], options["channels"], **make)
        k = torch.empty(1, 1, options["keys"], options["channels"], **make)
        calls = []
        monkeypatch.setattr(module, "in_blocks", lambda q, k, v: calls.append(q) or q)
        with rehearsing(options.get("device", GPU)):
            attention(q, k, k)
            with torch.no_grad():
                attention(q, k, k)
        assert len(calls) == (2 if wide else 1 if "gradient" in change else 0)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("leading", "positions", "channels"), [((1, 1), 16384, 512), ((2, 3), 1560, 1024)])
    def test_on_a_gpu_they_are_as_close_as_the_fused_kernel(
        self, leading: tuple[int, int], positions: int, channels: int, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        q, k, v = torch.randn(3, *leading, positions, channels, dtype=dtype, device="cuda").unbind()
        q = 2 * q
        exact = F.scaled_dot_product_attention(q[..., -99:, :].double(), k.double(), v.double())
        fused = distance(F.scaled_dot_product_attention(q, k, v)[..., -99:, :], exact)
        for row in (4096, 16384):
            # Of 16-bit results, "no further, plus 5 %".
            assert distance(in_blocks(q, k, v, row=row)[..., -99:, :], exact) < 1.05 * fused


def distance(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())
