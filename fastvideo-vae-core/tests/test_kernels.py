"""The Triton kernels against their definitions, in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from fastvideo_vae_core.testing.interpreter import interpreted

_SCRIPT = """
import json, math, torch, torch.nn.functional as F
from torch import nn
from fastvideo_vae_core.ops.kernels import rows
from fastvideo_vae_core.ops.kernels.group_norm import apply_affine, group_norm_silu, moments
from fastvideo_vae_core.ops.norm import Moments
from fastvideo_vae_core.ops.upsampling import spread

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
        moved = torch.randn(shape[1])
        y = group_norm_silu(x - moved.view(1, -1, *[1] * (len(shape) - 2)), norm, True, moved)
        errors[f"biased {shape}"] = float((y - F.silu(exact)).norm() / F.silu(exact).norm())
        found = moments(x, groups, moved)
        there = Moments.of(x.double() + moved.double().view(1, -1, *[1] * (len(shape) - 2)), groups)
        assert found.size == there.size
        errors[f"moments {shape}"] = max(
            float((one - other).norm() / other.norm().clamp(min=1e-9))
            for one, other in ((found.mean, there.mean), (found.spread, there.spread))
        )
        scale, offset = torch.randn(2, *shape[:2])
        view = (*shape[:2], *[1] * (len(shape) - 2))
        reference = F.silu(x.double() * scale.view(view) + offset.view(view))
        errors[f"affine {shape}"] = float((apply_affine(x, scale, offset, True) - reference).norm() / reference.norm())
    for channels in (8, 24, 128):
        x, other = torch.randn(2, 5, 9, 11, channels)[:, 1:4, 2:9, 3:9], torch.randn(2, 3, 7, 6, channels)
        whole, bias = torch.zeros(2, 6, 14, 12, channels), torch.randn(channels)
        out = whole[:, ::2, ::2, ::2]
        assert rows.takes(out, x, other) and not rows.takes(x[..., 1:])
        for name, given in (("plain", (None, None)), ("bias", (bias, None)), ("both", (bias, other))):
            rows.write(out, x, *given)
            wanted = x + sum(each for each in given if each is not None)
            errors[f"rows {channels} {name}"] = float((out - wanted).abs().max())
            # Nothing beside them.
            assert (whole != 0).sum() == (out != 0).sum()
    for repeats, causal in (((2, 2), False), ((1, 2, 2), True), ((2, 2, 2), True), ((2, 1), False)):
        ways = math.prod(repeats)
        made = torch.randn(2, *(5, 4, 7)[-len(repeats) :], ways * 24)
        for bias in (None, torch.randn(24)):
            wanted = spread(made, repeats, bias, causal)
            shifts = [0 if causal and axis == 0 else times - 1 for axis, times in enumerate(repeats)]
            out = torch.full_like(wanted, float("nan"))
            rows.spread(out, made, repeats, shifts, bias)
            errors[f"spread {repeats} {bias is None}"] = float((out - wanted).abs().max())
print(json.dumps(errors))
"""

_ATTENTION = """
import json, math, torch, torch.nn.functional as F
from fastvideo_vae_core.ops import attention
from fastvideo_vae_core.ops.kernels.attention import weigh_

def weighed(scores, keys, *rest):
    made = weigh_(scores, keys, rest[0] * math.log2(math.e), *rest[1:])
    assert not made[..., keys : scores.shape[-1]].any()
    return made[..., :keys]

torch.manual_seed(0)
errors = {}
plain = attention._weigh
for dtype in (torch.float16, torch.bfloat16):
    for leading, keys, row in (((1, 1), 200, 256), ((2, 1), 300, 128), ((1, 1), 3000, 16384)):
        q = 2 * torch.randn(*leading, 150, 320).to(dtype)
        k, v = torch.randn(2, *leading, keys, 320).to(dtype)
        made = {}
        for name, way in (("kernel", weighed), ("plain", plain)):
            attention._weigh = way
            made[name] = attention.in_blocks(q, k, v, row=row)
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        for name, each in made.items():
            errors[f"{dtype} {leading} {keys} {name}"] = float((each - exact).norm() / exact.norm())
print(json.dumps(errors))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this machine has no Triton")
def test_kernels_equal_their_definitions() -> None:
    errors = interpreted(_SCRIPT)
    assert len(errors) == 37
    # float32 around a mean of 30: a few units in the last place, of the numbers before the mean is taken off.
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this machine has no Triton")
def test_weights_of_attention_equal_their_definition() -> None:
    errors = interpreted(_ATTENTION)
    assert len(errors) == 12
    for name, error in errors.items():
        # The interpreter cuts bfloat16 off where GPUs round, which sums of the cut numbers make up for in part.
        most = 1.05 if "float16 " in name and "bfloat16" not in name else 1.5
        assert error < most * errors[name.replace("kernel", "plain")], errors
        assert error < (3e-4 if most < 1.5 else 4e-3), errors


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this machine has no Triton")
def test_sizes_share_their_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program takes half a second to compile on the first call, so many sizes share one."""
    from triton.runtime.jit import JITFunction

    from fastvideo_vae_core.ops.causal import Window
    from fastvideo_vae_core.ops.kernels import attention, clip, group_norm, rms_norm

    programs: set[object] = set()

    def recorded(self: Any, grid: object) -> Any:
        def launch(*args: Any, num_warps: int, **more: Any) -> None:
            values = dict(zip((each.name for each in self.params), args, strict=False)) | more
            key: list[object] = [self.fn.__name__, num_warps]
            for each in self.params:
                value = values[each.name]
                if isinstance(value, int) and not each.is_constexpr and not each.do_not_specialize:
                    key.append((value == 1, value % 16 == 0))
                elif each.is_constexpr or isinstance(value, torch.Tensor):
                    key.append(value.dtype if isinstance(value, torch.Tensor) else value)
            programs.add(tuple(key))

        return launch

    monkeypatch.setattr(JITFunction, "__getitem__", recorded)
    # Without numbers nothing would be launched.
    monkeypatch.setattr(torch.Tensor, "is_meta", False)
    for channels, frames, height, width in ((96, 1, 60, 104), (128, 4, 17, 30), (112, 3, 9, 5), (96, 16, 720, 1280)):
        rows = torch.empty(1, frames, height, width, channels, device="meta")
        bias, (scale, offset) = rows.new_empty(channels), rows.new_empty(2, 1, channels)
        for taps in (1, 3):
            out = rows.new_empty(1, frames + 2, height, width, taps * channels)
            for each in (None, bias):
                rms_norm.norm_silu_into(out, rows, bias, each, taps=taps, shift=2)
            window = Window(rows.new_empty(1, frames, height + 2, width + 2, taps * channels), taps, 2, 1)
            clip.fill(window, rows, (scale, offset), lead=taps - 1, borders=(1, 1))
        rms_norm.add_(rows, bias, rows)
        norm = nn.GroupNorm(16, channels, device="meta")
        group_norm.group_norm_silu(rows.movedim(-1, 1), norm, True)
    for pitch in (1024, 1600, 2048, 6272, 13376, 16384):
        for first in (True, False):
            scores, state = torch.empty(1, 128, pitch, device="meta"), torch.empty(3, 1, 128, device="meta").unbind()
            attention.weigh_(scores, pitch - 9, 0.1, torch.bfloat16, *state, first)
    names = [key[0] for key in programs if isinstance(key, tuple)]
    assert {name: names.count(name) for name in names} == {
        "_norm_silu_kernel": 1,
        "_add_kernel": 1,
        "_fill_kernel": 1,
        "_merge_kernel": 1,
        # Up to 2048 keys in a row, 8192 and 16384.
        "_weigh_kernel": 3,
        # One for each number of channels, of which a network has few.
        "_moments_kernel": 3,
        "_affine_silu_kernel": 3,
    }
