"""Sums and activations between convolutions: the kernels, in Triton's interpreter, against the definitions."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvideo_vae_core.ops.between import antialiased_snake, leaky, mean
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.testing.interpreter import interpreted
from fastvideo_vae_core.testing.parity import relative_error

_SCRIPT = """
import itertools, json, torch
from fastvideo_vae_core.ops.between import antialiased_snake, leaky
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.ops.kernels import antialiased as kernels

def error(made, exact):
    return float((made.double() - exact).abs().max() / exact.abs().max())

def signal(*shape, last):
    x = torch.randn(shape).to(dtype)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if last else x

def evened(x, room):
    # x with numbers behind it that count for nothing.
    wide = torch.full((*x.shape[:2], room), 7.0, dtype=x.dtype)
    wide = wide.mT.contiguous().mT if last else wide
    wide[..., : x.shape[2]] = x
    return wide

def double(x):
    return Sum(*(None if each is None else each.double() for each in x))

torch.manual_seed(0)
errors = {}
with torch.no_grad():
    for dtype, last in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        up, down = (torch.rand(1, 1, 12).to(dtype) / 6 for _ in range(2))
        names = [f"{what} {dtype} {last}" for what in ("sum", "snake", "mean", "leaky")]
        errors.update(dict.fromkeys(names, 0.0))
        # Less than a group, uneven, and more than a program holds of samples and of channels.
        for shape, room in (((2, 3, 1), 3), ((1, 2, 5), 6), ((1, 33, 35), 40) if last else ((1, 1, 1030), 1030)):
            bias, alpha, beta = torch.randn(3, shape[1]).mul(0.5).to(dtype)
            for branched, biased, keep in ((False, True, False), (True, True, True)):
                parts = [Sum(signal(*shape, last=last), signal(*shape, last=last) if branched else None,
                             bias if biased else None) for _ in range(3)]
                exact = [double(part) for part in parts]
                total, y = kernels.antialiased_snake(parts[0], alpha, beta, up, down, keep, room)
                wanted = antialiased_snake(
                    exact[0], alpha.double(), beta.double(), up.double(), down.double(), keep=True)
                assert (total is not None) == keep
                samples = shape[2]
                assert y.shape[2] == room and not y[..., samples:].any()
                if keep:
                    errors[names[0]] = max(errors[names[0]], error(total, wanted[0]))
                errors[names[1]] = max(errors[names[1]], error(y[..., :samples], wanted[1]))
                for count in (3, 1) if branched else (1,):
                    # The kernel may write over its first part.
                    taken = [part._replace(x=part.x.clone()) for part in parts[:count]]
                    assert kernels.alike(taken)
                    total, y = kernels.leaky(taken, 0.1, mean=True, keep=keep, samples=samples, extent=room)
                    wanted = leaky(exact[:count], 0.1, keep=True)
                    assert len(total) == keep and len(y) == 1
                    assert y[0].shape[2] == room and not y[0][..., samples:].any()
                    if keep:
                        errors[names[2]] = max(errors[names[2]], error(total[0], wanted[0]))
                    errors[names[3]] = max(errors[names[3]], error(y[0][..., :samples], wanted[1]))
            # Three at once, in place of what they are made from where that has room; first a branch that all share.
            samples = shape[2]
            for branched, keep, own in ((False, False, True), (True, True, False), (True, True, True)):
                shared = evened(signal(*shape, last=last), room)
                parts = [Sum(evened(signal(*shape, last=last), room),
                             (evened(signal(*shape, last=last), room) if own else shared) if branched else None,
                             bias)
                         for _ in range(3)]
                exact = [double(Sum(*(None if each is None else each[..., :samples] for each in part[:2]), bias))
                         for part in parts]
                assert kernels.alike(parts)
                totals, ys = kernels.leaky(parts, 0.1, mean=False, keep=keep, samples=samples, extent=room)
                places = parts if not keep else [Sum(part.branch) for part in parts]
                for y, place in zip(ys, places):
                    assert (y.data_ptr() == place.x.data_ptr()) == own
                for part, y in zip(exact, ys, strict=True):
                    assert y.shape[2] == room and not y[..., samples:].any()
                    errors[names[3]] = max(errors[names[3]], error(y[..., :samples], leaky([part], 0.1)[1]))
                for part, total in zip(exact if keep else [], totals, strict=True):
                    errors[names[2]] = max(errors[names[2]], error(total[..., :samples], part.value()))
print(json.dumps(errors))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this machine has no Triton")
def test_kernels_equal_their_definitions() -> None:
    errors = interpreted(_SCRIPT)
    assert len(errors) == 16
    for name, error in errors.items():
        # One rounding at the end, of 24 or 8 bits, where the interpreter cuts off instead; largest difference over
        # largest value.
        assert error <= (1e-6 if "float32" in name else 8e-3), (name, error)


def test_snake_at_twice_the_rate_is_its_parts() -> None:
    x, up, down = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 19), (1, 1, 12), (1, 1, 12)))
    alpha, beta = torch.randn(2, 3, dtype=torch.float64)
    padded = F.pad(x, (5, 5), mode="replicate")
    doubled = 2 * F.conv_transpose1d(padded, up.expand(3, 1, 12), stride=2, groups=3)[..., 15:-15]
    curved = doubled + (doubled * alpha.exp()[:, None]).sin().square() / (beta.exp()[:, None] + 1e-9)
    expected = F.conv1d(F.pad(curved, (5, 6), mode="replicate"), down.expand(3, 1, 12), stride=2, groups=3)
    total, y = antialiased_snake(Sum(x), alpha, beta, up, down, keep=True)
    assert total is not None
    assert torch.equal(total, x)
    assert relative_error(y, expected) <= 1e-14


def test_leaky_relu_is_taken_of_the_mean() -> None:
    x, bias, act = torch.randn(2, 3, 19, dtype=torch.float64), torch.randn(3).double(), nn.LeakyReLU(0.1)
    parts = [Sum(x, -3 * x, bias), Sum(x), Sum(2 * x, None, bias)]
    expected = (x + 2 * bias[:, None]) / 3
    assert relative_error(mean(parts), expected) <= 1e-14
    total, y = leaky(parts, 0.1, keep=True)
    assert total is not None
    assert relative_error(total, expected) <= 1e-14
    assert relative_error(y, act(expected)) <= 1e-14
    assert leaky(parts, 0.1)[0] is None
    assert relative_error(leaky(parts, 1.0)[1], expected) <= 1e-14
