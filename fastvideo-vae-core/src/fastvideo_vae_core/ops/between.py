"""What stands between two convolutions of a vocoder: sums, and the activation that the next convolution is taken of.

Sources: LeakyReLU as in HiFi-GAN; Snake between filters against aliasing as in NVIDIA/BigVGAN
`alias_free_activation/torch/act.py`, which is StyleGAN 3's idea.

On a GPU these networks are little more than the cost of launching their kernels, so each function is one kernel there.
Results may then have `room` more behind their samples, zeros for the dilation of the next convolution (`conv1d.room`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo_vae_core.ops.snake import snake
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.rehearsal import device_of

# Of each filter.
TAPS = 12


def leaky(parts: Sequence[Sum], slope: float, room: int = 0, keep: bool = False) -> tuple[Tensor | None, Tensor]:
    """LeakyReLU of the mean of sums (B, C, S), behind the mean if that is to be kept. A slope of 1 leaves the mean.

    What is kept, or else the result, may take the place of `parts[0].x`.
    """
    if fuses(parts[0].x):
        # Imported here because Triton takes a second to import and only GPUs need it.
        from fastvideo_vae_core.ops.kernels import antialiased as kernels

        taken = parts if kernels.alike(parts) else [Sum(mean(parts))]
        samples = taken[0].x.shape[2]
        totals, ys = kernels.leaky(taken, slope, mean=True, keep=keep, samples=samples, extent=samples + room)
        return totals[0] if keep else None, ys[0]
    total = mean(parts)
    return total if keep else None, total if slope == 1.0 else F.leaky_relu(total, slope)


def even_leaky(
    parts: Sequence[Sum], slope: float, *, samples: int, even: int, mean: bool = False, keep: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """LeakyReLU of sums for `conv1d.even1d`, or that of their mean, behind the sums themselves if they are to be kept;
    of all of them in one launch. Only where it `fuses`.

    samples: how many the sums have. even: how many the results are to have, zeros among them (`conv1d.evened`).

    What is kept, or else the results, take the places of each `x`, and of branches if these are not one for all.
    """
    from fastvideo_vae_core.ops.kernels import antialiased as kernels

    if kernels.alike(parts):
        return kernels.leaky(parts, slope, mean=mean, keep=keep, samples=samples, extent=even)
    assert not mean
    made = [kernels.leaky([part], slope, mean=False, keep=keep, samples=samples, extent=even) for part in parts]
    return [total for totals, _ in made for total in totals], [y for _, ys in made for y in ys]


def antialiased_snake(
    x: Sum, alpha: Tensor, beta: Tensor, up: Tensor, down: Tensor, room: int = 0, keep: bool = False
) -> tuple[Tensor | None, Tensor]:
    """Snake of a sum (B, C, S) at twice the rate, behind the sum if that is to be kept.

    alpha, beta: logarithms (C,). up, down: the filters (..., 12) that double and halve the rate.
    """
    if fuses(x.x, alpha):
        from fastvideo_vae_core.ops.kernels import antialiased as kernels

        return kernels.antialiased_snake(x, alpha, beta, up, down, keep, x.x.shape[2] + room)
    total = x.value()
    # Every channel is filtered alike.
    doubled = _doubled(total.flatten(0, 1).unsqueeze(1), up).view(*total.shape[:2], -1)
    curved = snake(doubled, alpha[None, :, None], beta[None, :, None])
    padded = F.pad(curved.flatten(0, 1).unsqueeze(1), (TAPS // 2 - 1, TAPS // 2), mode="replicate")
    y = F.conv1d(padded, down.to(total.dtype), stride=2).view(total.shape)
    return total if keep else None, y


def mean(parts: Sequence[Sum]) -> Tensor:
    """The mean of sums (B, C, S) in their layout, rounded once."""
    values = [part.value() for part in parts]
    if len(values) == 1:
        return values[0]
    if values[0].stride(1) == 1:
        return torch.stack([value.mT for value in values]).mean(0).mT
    return torch.stack(values).mean(0)


def fuses(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the Triton kernels take this: on a GPU, at most float32, and nothing to differentiate."""
    if device_of(x).type != "cuda" or x.dtype == torch.float64 or not _TRITON:
        return False
    return not (torch.is_grad_enabled() and any(each.requires_grad for each in (x, *parameters)))


def _doubled(x: Tensor, taps: Tensor) -> Tensor:
    """The transposed convolution with stride 2 as two convolutions, one for the samples of each parity."""
    even, odd = taps.flip(-1)[..., ::2], taps.flip(-1)[..., 1::2]
    both = 2 * torch.cat([F.pad(even, (0, 1)), F.pad(odd, (1, 0))]).to(x.dtype)
    half = TAPS // 4
    return F.conv1d(F.pad(x, (half, half), mode="replicate"), both).transpose(1, 2).flatten(1)


_TRITON = importlib.util.find_spec("triton") is not None
