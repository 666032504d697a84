"""Weight norm, folded: a weight that is stored as direction and norm appears as the one tensor that it stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastvideo_vae_core.checkpoint import Checkpoint

# The ends of the names of norm and direction, as torch.nn.utils.weight_norm and its parametrization spell them.
_SPELLINGS = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
)


def folded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with `x.weight` for every pair of `x.weight_g` and `x.weight_v`, computed when it is read."""
    infos, sources = dict(checkpoint.infos), dict(checkpoint._sources)
    for norm in checkpoint.infos:
        for end, other in _SPELLINGS:
            stem = norm.removesuffix(end)
            if stem != norm and _fits(checkpoint, norm, stem + other):
                infos[f"{stem}.weight"] = infos.pop(stem + other)
                sources[f"{stem}.weight"] = NormedWeight(checkpoint, norm, stem + other)
                del infos[norm]
    return replace(checkpoint, infos=infos, _sources=sources)


def fold(norm: Tensor, direction: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that norm (N, 1, ...) and direction (N, ...) stand for, as PyTorch computes it in that type."""
    weight = torch._weight_norm(direction.to(dtype), norm.to(dtype), 0)
    # A slice of zeros with a norm of zero stands for zeros, not for 0 / 0.
    return torch.where(norm == 0, torch.zeros((), dtype=dtype), weight)


def unfold(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Norm and direction of a weight. Folding them again gives the same weight bit for bit: the norms are in at least
    float32, and those that folding is going to divide by."""
    wide = weight.detach().cpu().to(torch.promote_types(weight.dtype, torch.float32))
    ones = torch.ones((len(weight), *[1] * (weight.ndim - 1)), dtype=wide.dtype)
    _, norm = torch._weight_norm_interface(wide.contiguous(), ones, 0)
    return norm.view_as(ones).to(weight.device), weight


@dataclass(frozen=True)
class NormedWeight:
    """A weight that is not in the file, but its norm and direction are."""

    checkpoint: Checkpoint
    norm: str
    direction: str

    def read(self, dtype: torch.dtype, values: int | None = None) -> Tensor:
        """The weight, computed in that type but at least in float32; or as many slices of it as have `values`."""
        norm, direction = self.checkpoint.read(self.norm), self.checkpoint.read(self.direction)
        slices = None if values is None else -(-values * len(direction) // direction.numel())
        return fold(norm[:slices], direction[:slices], torch.promote_types(dtype, torch.float32))


def _fits(checkpoint: Checkpoint, norm: str, direction: str) -> bool:
    if direction not in checkpoint.infos:
        return False
    first, *rest = checkpoint.infos[direction].shape
    return checkpoint.infos[norm].shape == (first, *[1] * len(rest))
