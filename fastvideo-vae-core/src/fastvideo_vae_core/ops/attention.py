"""Attention over all positions of a grid, with a single head, as the middle blocks of autoencoders have it.

Shape legend: B batch, N queries, K keys, C channels of the head.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.ops.norm import group_norm
from fastvideo_vae_core.rehearsal import device_of

# Queries, keys and values (B, 1, N, C) to what the values mix to.
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]

# Channels of a head, and how many keys from which on blocks of products pay, as measured on an H100: at 512 channels
# 16384 keys take 1.8 ms instead of 4.5, and 4096 take 0.42 instead of 0.37; at 1024 channels 1560 keys take 0.8 instead
# of 1.8. At 384 channels and 6240 keys they do not pay, nor where the number of keys is odd.
_FEWEST_KEYS = ((1024, 1024), (512, 8192))
# Bytes of float32 scores that are there at a time, and keys in a row of them, which a kernel holds in registers.
_SCORES, _ROW = 128 << 20, 16384
# Rows of scores begin at multiples of this many, and blocks of queries have multiples of those many, so that products
# are aligned and fill their tiles.
_PITCH, _TILE = 64, 128
_TRITON = importlib.util.find_spec("triton") is not None


class GridAttention(nn.Module):
    """Residual self-attention of one head over the positions of x (B, C, ...), behind a group norm.

    Parameters have diffusers' names: group_norm, to_q, to_k, to_v, to_out.0.
    """

    def __init__(self, channels: int, groups: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self._attend(x, x, attention)

    def excerpt(self, x: Tensor, region: Sequence[slice]) -> Tensor:
        """A region of the result, along the axes behind (B, C), for its share of the work."""
        return self._attend(x, x[(slice(None), slice(None), *region)], attention, region)

    def _attend(self, x: Tensor, asking: Tensor, mix: Mix, region: Sequence[slice] = ()) -> Tensor:
        normed = group_norm(x, self.group_norm)
        tokens = normed.flatten(2).transpose(1, 2)
        asked = normed[(slice(None), slice(None), *region)].flatten(2).transpose(1, 2) if region else tokens
        q, k, v = self.to_q(asked).unsqueeze(1), self.to_k(tokens).unsqueeze(1), self.to_v(tokens).unsqueeze(1)
        mixed = mix(q, k, v).squeeze(1)
        made = self.to_out[0](mixed).transpose(1, 2).reshape(asking.shape)
        # A sum takes the layout of what comes first: on a GPU that of the grid, on a CPU as the reference has it.
        return asking + made if device_of(x).type == "cuda" else made + asking


class FrameCausalAttention(GridAttention):
    """The same over a clip (B, C, T, H, W), where a position sees its own frame and the frames before it."""

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        frame = x_BCTHW.shape[3] * x_BCTHW.shape[4]
        return self._attend(x_BCTHW, x_BCTHW, lambda q, k, v: prefix_attention(q, k, v, frame))

    def excerpt(self, x_BCTHW: Tensor, region: Sequence[slice]) -> Tensor:
        frame = x_BCTHW.shape[3] * x_BCTHW.shape[4]
        asking = x_BCTHW[(slice(None), slice(None), *region)]
        first, asked = region[0].indices(x_BCTHW.shape[2])[0], asking.shape[3] * asking.shape[4]
        return self._attend(x_BCTHW, asking, lambda q, k, v: prefix_attention(q, k, v, frame, asked, first), region)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, block: int, asked: int | None = None, first: int = 0) -> Tensor:
    """Attention (B, heads, N, C) in which a position sees its own block of positions and the blocks before it.

    asked: queries for each block, if not all of it asks; they begin with the block number `first`.

    A mask would have N^2 entries. Each block attends to its prefix instead, which is half the work and no memory.
    """
    queries = q.split(block if asked is None else asked, dim=-2)
    ends = range((first + 1) * block, k.shape[-2] + 1, block)
    return torch.cat(
        [attention(part, k[..., :end, :], v[..., :end, :]) for part, end in zip(queries, ends, strict=False)],
        dim=-2,
    )


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v for q (..., N, C), k and v (..., K, C): in a fused kernel, or `in_blocks` of products
    for wide heads on a GPU."""
    if _is_wide(q, k, v):
        return in_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def in_blocks(q: Tensor, k: Tensor, v: Tensor, *, scores: int | None = None, row: int = _ROW) -> Tensor:
    """The same as two matrix products with a softmax between, for some queries and keys at a time.

    Scores, weights until they are rounded for the product, and sums are in float32. Weights are relative to the
    largest that was met so far, so what earlier keys mixed to is scaled down when a larger one comes (Rabe and Staats
    2021; Dao et al. 2022), and their sum, of the rounded ones, is divided by at the end.

    scores: bytes of the float32 scores of a block, about; by default more where there are many queries, so that
        there are not too many blocks to ask for.
    row: most keys of a block.
    """
    items, keys, values = (each.flatten(0, -3) for each in (q, k, v))
    batch, queries, channels = items.shape
    scores = max(_SCORES, items[0].nbytes) if scores is None else scores
    columns = _shares(keys.shape[1], row, _PITCH)
    row_bytes = 4 * _padded(columns)
    rows = _shares(queries, max(scores // row_bytes // _TILE, 1) * _TILE, _TILE)
    together = min(max(scores // (row_bytes * rows), 1), batch)
    block = q.new_empty(together * rows * _padded(columns), dtype=torch.float32)
    state = q.new_empty(3, _padded(together * rows), dtype=torch.float32)
    mixed = q.new_empty(1 if columns >= keys.shape[1] else 2, together * rows * channels, dtype=torch.float32)
    if q.is_meta:
        # In a rehearsal: the memory is what is there now, and the work that of the fused kernel.
        return F.scaled_dot_product_attention(q, k, v)
    made = q.new_empty(items.shape)
    for item in _cut(batch, together):
        for asked in _cut(queries, rows):
            part = items[item, asked]
            into = mixed[:, : part.numel()].view(-1, *part.shape)
            tops, sums, factors = state[:, : part.shape[0] * part.shape[1]].view(3, *part.shape[:2])
            for seen in _cut(keys.shape[1], columns):
                each = keys[item, seen]
                width = _padded(each.shape[1])
                found = block[: tops.numel() * width].view(*tops.shape, width)
                _multiply(part, each.mT, found[..., : each.shape[1]])
                weights = _weigh(found, each.shape[1], channels**-0.5, q.dtype, tops, sums, factors, seen.start == 0)
                _multiply(weights, values[item, seen], into[-1] if seen.start else into[0])
                if seen.start:
                    torch.addcmul(into[1], into[0], factors[..., None], out=into[0])
            torch.div(into[0], sums[..., None], out=made[item, asked])
    return made.view(q.shape)


def _is_wide(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a GPU takes this in blocks: a head that is wider than fast kernels are made for, enough keys, 16 bits,
    and nothing to differentiate."""
    if device_of(q).type != "cuda" or not _TRITON or torch.version.hip is not None:
        return False
    if torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v)):
        return False
    keys = k.shape[-2]
    pays = keys % 8 == 0 and any(q.shape[-1] >= channels and keys >= fewest for channels, fewest in _FEWEST_KEYS)
    return pays and q.dtype in (torch.float16, torch.bfloat16)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Products of matrices (B, I, J) and (B, J, K) into float32 `out`."""
    if a.is_cuda:
        torch.bmm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.bmm(a.float(), b.float(), out=out)


def _weigh(
    scores: Tensor,
    keys: int,
    scale: float,
    dtype: torch.dtype,
    tops: Tensor,
    sums: Tensor,
    factors: Tensor,
    first: bool,
) -> Tensor:
    """Weights (B, N, K) of the values from scores (B, N, K') of which the first K count, for some of the keys.

    tops, sums: (B, N), what the weights are relative to and their sum with those before; both are brought up to date.
    factors: (B, N), set to what that makes of earlier weights.
    first: whether there were none before.
    """
    scale *= math.log2(math.e)
    if scores.is_cuda:
        # Imported here because Triton takes a second to import and only GPUs need it.
        from fastvideo_vae_core.ops.kernels.attention import weigh_

        return weigh_(scores, keys, scale, dtype, tops, sums, factors, first)[..., :keys]
    scores = scores[..., :keys]
    top = scores.amax(-1)
    if first:
        tops.fill_(-torch.inf)
        sums.zero_()
    top = torch.maximum(top, tops)
    weights = ((scores - top[..., None]) * scale).exp2().to(dtype)
    factors.copy_(((tops - top) * scale).exp2())
    sums.mul_(factors).add_(weights.sum(-1, dtype=torch.float32))
    tops.copy_(top)
    return weights


def _shares(size: int, most: int, unit: int) -> int:
    """The size of equal parts of at most `most`, in whole units unless one part is all."""
    parts = math.ceil(size / most)
    return size if parts == 1 else math.ceil(size / parts / unit) * unit


def _cut(size: int, length: int) -> Iterator[slice]:
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))


def _padded(keys: int) -> int:
    return math.ceil(keys / _PITCH) * _PITCH
