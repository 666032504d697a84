"""Whether a tensor holds numbers only, and what the look costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastvideo_vae_core.finite import is_finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_is_enough(dtype: torch.dtype, value: float) -> None:
    x = torch.randn(3, 500, dtype=dtype)
    assert is_finite(x)
    x[1, 123] = value
    assert not is_finite(x)
    assert not is_finite(x.T)


def test_nothing_is_finite() -> None:
    assert is_finite(torch.empty(0, 3))


def test_takes_no_memory() -> None:
    """A result that only just fits must not need its size again to be looked at."""

    class Made(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            tensors = [each for each in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(each)]
            self.largest = max(self.largest, *(each.numel() for each in tensors), 0)
            return out

    x = torch.randn(1000)
    with Made() as made:
        assert is_finite(x)
    assert made.largest == 1
