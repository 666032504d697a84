"""Sums that are still to be added up."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sum(NamedTuple):
    """A sum that the next operation takes, so that adding up costs no pass over memory of its own.

    Attributes:
        x, branch: (B, C, ...).
        bias: (C,).
    """

    x: Tensor
    branch: Tensor | None = None
    bias: Tensor | None = None

    def value(self) -> Tensor:
        """The sum (B, C, ...)."""
        total = self.x if self.branch is None else self.x + self.branch
        return total if self.bias is None else total + self.bias.view(-1, *[1] * (total.ndim - 2))
