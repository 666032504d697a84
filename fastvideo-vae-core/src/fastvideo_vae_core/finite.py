"""Whether a tensor holds numbers only."""

from __future__ import annotations

from torch import Tensor


def is_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite, of a tensor of any shape and real type.

    The smallest and the largest element tell, NaN being both where there is one: one pass and no memory, where
    `isfinite` writes the magnitudes and three masks first, which is more than the tensor itself.
    """
    return x.numel() == 0 or all(bool(bound.isfinite()) for bound in x.aminmax())
