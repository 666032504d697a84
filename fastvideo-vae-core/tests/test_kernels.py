"""The Triton kernels against their definitions, in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import importlib.util

import pytest

from fastvideo_vae_core.testing.interpreter import interpreted

_SCRIPT = """
import json, torch, torch.nn.functional as F
from torch import nn
from fastvideo_vae_core.ops.kernels.group_norm import apply_affine, group_norm_silu

def last(x):
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)

torch.manual_seed(0)
errors = {}
with torch.no_grad():
    for shape, groups in (((2, 64, 13, 17), 32), ((1, 96, 5, 40), 8), ((3, 8, 1, 1), 2), ((1, 32, 3, 8, 9), 4)):
        x = last(torch.randn(shape) * 2 + 30)
        norm = nn.GroupNorm(groups, shape[1], eps=1e-6)
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        exact = F.group_norm(x.double(), groups, norm.weight.double(), norm.bias.double(), norm.eps)
        for silu in (False, True):
            reference = F.silu(exact) if silu else exact
            y = group_norm_silu(x, norm, silu)
            assert y.stride() == x.stride()
            errors[f"norm {shape} {silu}"] = float((y - reference).norm() / reference.norm())
        scale, offset = torch.randn(2, *shape[:2])
        view = (*shape[:2], *[1] * (len(shape) - 2))
        reference = F.silu(x.double() * scale.view(view) + offset.view(view))
        errors[f"affine {shape}"] = float((apply_affine(x, scale, offset, True) - reference).norm() / reference.norm())
print(json.dumps(errors))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this machine has no Triton")
def test_kernels_equal_their_definitions() -> None:
    errors = interpreted(_SCRIPT)
    assert len(errors) == 12
    # float32 around a mean of 30: a few units in the last place, of the numbers before the mean is taken off.
    assert max(errors.values()) < 1e-5, errors
