"""Group normalisation whose statistics may come from elsewhere: from tiles that together are the whole grid."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.rehearsal import device_of


@dataclass(frozen=True, eq=False)
class Moments:
    """First two moments of a set of numbers: how many, their mean (B, G), and the sum of squared distances from it.

    They are merged in float64, so that any number of tiles loses nothing that float32 keeps.
    """

    size: int
    mean: Tensor
    spread: Tensor
    # What `affine` has found.
    _affines: dict[Hashable, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, x: Tensor, groups: int, bias: Tensor | None = None) -> Moments:
        """Moments of x (B, C, ...), with a bias (C) added to it, in `groups` groups of neighbouring channels."""
        if _on_gpu(x) and not x.requires_grad:
            # Imported here, and below, because Triton takes a second to import and only GPUs need it.
            from fastvideo_vae_core.ops.kernels.group_norm import moments

            return moments(x.contiguous(memory_format=_CHANNELS_LAST[x.ndim]), groups, bias)
        x = x if bias is None else x + bias.view(-1, *[1] * (x.ndim - 2))
        grouped = x.reshape(x.shape[0], groups, -1)
        wide = grouped.to(torch.promote_types(x.dtype, torch.float32))
        # Around the tile's own mean, never as a difference of large squares; what float32 rounds off that mean is put
        # back afterwards. Sums in float64 would need a copy of the grid in float64.
        rough = wide.mean(-1)
        variance, rest = torch.var_mean(wide - rough[..., None], -1, correction=0)
        size = grouped.shape[-1]
        return cls(size, rough.double() + rest.double(), variance.double() * size)

    @classmethod
    def merged(cls, parts: Sequence[Moments]) -> Moments:
        """Moments of all sets together (Chan, Golub and LeVeque 1979)."""
        if len(parts) == 1:
            return parts[0]
        sizes = [part.size for part in parts]
        size = sum(sizes)
        if parts[0].mean.is_meta:
            return cls(size, parts[0].mean, parts[0].spread)
        means = [part.mean for part in parts]
        mean = torch.stack(torch._foreach_mul(means, [each / size for each in sizes])).sum(0)
        squares = [gap * gap for gap in torch._foreach_sub(means, [mean] * len(means))]
        between = torch.stack(torch._foreach_mul(squares, sizes)).sum(0)
        return cls(size, mean, torch.stack([part.spread for part in parts]).sum(0) + between)

    def affine(self, norm: nn.GroupNorm, dtype: torch.dtype, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm by these moments as y = x * scale + offset, (B, C) each, of numbers to which a bias (C) is still to
        be added. Kept, because all tiles and pieces of a grid ask for it."""
        key = norm, dtype, None if bias is None else id(bias)
        if key not in self._affines:
            self._affines[key] = self._new_affine(norm, dtype, bias)
        return self._affines[key]

    def _new_affine(self, norm: nn.GroupNorm, dtype: torch.dtype, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.mean.is_meta:
            scale, offset = self.mean.new_empty(2, len(self.mean), norm.num_channels, dtype=dtype)
            return scale, offset
        channels = norm.num_channels // norm.num_groups
        rstd = (self.spread / self.size + norm.eps).rsqrt()
        scale = rstd.repeat_interleave(channels, dim=1) * norm.weight.double()
        mean = self.mean.repeat_interleave(channels, dim=1)
        moved = mean if bias is None else mean - bias.double()
        return scale.to(dtype), (norm.bias.double() - moved * scale).to(dtype)


def group_norm(x: Tensor, norm: nn.GroupNorm, moments: Moments | None = None) -> Tensor:
    """Normalise x (B, C, ...) by its own statistics, or by those of the larger grid that it is a part of."""
    if _fuses(x, norm):
        return _fused(x, norm, moments, silu=False)
    if moments is None:
        return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    # y = x * scale + offset, one multiply-add an element, in at least float32 as PyTorch's own kernel does.
    compute = torch.promote_types(x.dtype, torch.float32)
    scale, offset = (each.view(*each.shape, *[1] * (x.ndim - 2)) for each in moments.affine(norm, compute))
    return torch.addcmul(offset, x.to(compute), scale).to(x.dtype)


def group_norm_act(
    x: Tensor,
    norm: nn.GroupNorm,
    act: Callable[[Tensor], Tensor],
    moments: Moments | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Group norm and activation. The normalised tensor is new, so SiLU overwrites it unless a gradient needs it.

    bias: (C), still to be added to x, which the moments are those of behind it; it costs no pass over memory where
        `fuses`.
    """
    if bias is not None and not fuses(x, norm, act):
        x, bias = x + bias.view(-1, *[1] * (x.ndim - 2)), None
    if fuses(x, norm, act):
        return _fused(x, norm, moments, silu=True, bias=bias)
    y = group_norm(x, norm, moments)
    return F.silu(y, inplace=True) if act is F.silu and not y.requires_grad else act(y)


def fuses(x: Tensor, norm: nn.GroupNorm, act: Callable[[Tensor], Tensor]) -> bool:
    """Whether norm and activation are computed in kernels, which take biases of convolutions with them."""
    return act is F.silu and _fuses(x, norm)


def defers(weight: Tensor, act: Callable[[Tensor], Tensor]) -> bool:
    """Whether convolutions of that type leave their biases to the norm that reads next, on the device of the weight."""
    return act is F.silu and device_of(weight).type == "cuda" and _TRITON and weight.dtype in _SIXTEEN_BITS


def plus(x: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """x + bias + other for grids that `fuses` is true of, in the place of x if its channels are innermost."""
    from fastvideo_vae_core.ops.kernels.rms_norm import add_

    x = x.contiguous(memory_format=_CHANNELS_LAST[x.ndim])
    add_(x.movedim(1, -1), bias, other.movedim(1, -1))
    return x


def formulation(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """For people: how convolutions and norms are computed on that device in that type."""
    if device.type == "cuda" and _TRITON and dtype in _SIXTEEN_BITS:
        return ("channels-last, group norm and SiLU in two kernels",)
    return ()


def _on_gpu(x: Tensor) -> bool:
    """Whether the Triton kernels can take this: channels innermost, on a GPU, at most float32."""
    if device_of(x).type != "cuda" or not _TRITON or x.dtype == torch.float64:
        return False
    return x.ndim in _CHANNELS_LAST and x.stride(1) == 1


def _fuses(x: Tensor, norm: nn.GroupNorm) -> bool:
    """Whether the Triton kernels take this: there is nothing to differentiate either."""
    return _on_gpu(x) and not (torch.is_grad_enabled() and (x.requires_grad or norm.weight.requires_grad))


def _fused(x: Tensor, norm: nn.GroupNorm, moments: Moments | None, silu: bool, bias: Tensor | None = None) -> Tensor:
    from fastvideo_vae_core.ops.kernels import group_norm as kernels

    # A part of a grid has gaps between its rows.
    x = x.contiguous(memory_format=_CHANNELS_LAST[x.ndim])
    if moments is None:
        return kernels.group_norm_silu(x, norm, silu, bias)
    return kernels.apply_affine(x, *moments.affine(norm, torch.float32, bias), silu)


_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_TRITON = importlib.util.find_spec("triton") is not None
