"""Snake and its Triton kernels against the definition, in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvideo_vae_core.ops import conv1d as ops
from fastvideo_vae_core.ops.conv1d import _folded, _interleaved, conv1d, needs, upsample1d
from fastvideo_vae_core.ops.snake import Snake, snake, snake_pointwise
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.testing.interpreter import interpreted
from fastvideo_vae_core.testing.parity import relative_error

_SCRIPT = """
import itertools, json, torch, torch.nn.functional as F
from torch import nn
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.ops.kernels.snake import snake_of_sum, snake_pointwise
from fastvideo_vae_core.ops.snake import snake

def error(made, exact):
    return float((made.double() - exact).norm() / exact.norm())

def grid(*shape, last):
    x = (4 * torch.randn(shape)).to(dtype)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if last else x

torch.manual_seed(0)
errors = {}
with torch.no_grad():
    for dtype, last in itertools.product((torch.float32, torch.float16), (False, True)):
        worst = 0.0
        for shape in ((2, 5, 131), (1, 128, 300), (2, 200, 1)):
            x, branch = grid(*shape, last=last), grid(*shape, last=last)
            bias = torch.randn(shape[1]).to(dtype)
            alpha, beta = torch.randn(2, 1, shape[1], 1).mul(0.5).to(dtype)
            for with_branch, with_bias, keep in itertools.product((False, True), repeat=3):
                # A sum that is kept takes the place of its first part.
                parts = Sum(x.clone(), branch if with_branch else None, bias if with_bias else None)
                total, y = snake_of_sum(parts, alpha, beta, keep)
                exact = x.double() + with_branch * branch.double() + with_bias * bias.double()[:, None]
                if keep:
                    worst = max(worst, error(total, exact))
                    exact = total.double()
                assert (total is not None) == keep
                worst = max(worst, error(y, snake(exact, alpha.double(), beta.double())))
        errors[f"snake {dtype} {last}"] = worst
    dtype = torch.float32
    view = grid(2, 6, 50, last=True)[..., 3:40]
    zero = torch.zeros(1, 6, 1)
    errors["snake of a view"] = error(snake_of_sum(Sum(view), zero, zero, False)[1], snake(view.double(), zero, zero))
    total, y = snake_of_sum(Sum(view), zero, zero, True, 5)
    assert total.shape == view.shape and y.shape[2] == view.shape[2] + 5 and not y[..., -5:].any()
    errors["room in float32"] = error(y[..., :-5], snake(view.double(), zero, zero))
    dtype = torch.float16
    x, three = 12 * grid(1, 64, 400, last=True), torch.full((1, 64, 1), 3.0).half()
    exact = snake(x.double(), three.double(), -three.double())
    errors["snake of large angles"] = error(snake_of_sum(Sum(x), three, -three, False)[1], exact)
    for channels in (64, 128, 256):
        conv = nn.Conv1d(channels, channels, 1).half()
        x, skip = (grid(2, channels, 150, last=True) for _ in range(2))
        bias = torch.randn(channels).half()
        alpha, beta = torch.randn(2, 1, channels, 1).half()
        y = snake_pointwise(Sum(x, None, bias), alpha, beta, conv, skip)
        act = snake(x.double() + bias.double()[:, None], alpha.double(), beta.double())
        errors[f"pointwise {channels}"] = error(y, skip + F.conv1d(act, conv.weight.double(), conv.bias.double()))
print(json.dumps(errors))
"""


@pytest.mark.parametrize("samples", [60, 47])
@pytest.mark.parametrize(("kernel", "dilation", "times"), [(7, 3, 3), (11, 5, 5), (3, 5, 0), (3, 1, 2)])
def test_rows_of_the_dilation_make_the_dilated_convolution(
    samples: int, kernel: int, dilation: int, times: int
) -> None:
    conv = nn.Conv1d(8, 6, kernel, 1, times * dilation, dilation, bias=False, dtype=torch.float64)
    x = torch.randn(2, 8, samples, dtype=torch.float64)
    assert relative_error(_folded(x, conv, samples), conv(x)) <= 1e-15
    rows = x.mT.contiguous()
    assert relative_error(_folded(rows.mT, conv, samples), conv(x)) <= 1e-15
    with_zeros = F.pad(rows, (0, 0, 0, -samples % dilation))
    assert relative_error(_folded(with_zeros.mT, conv, samples), conv(x)) <= 1e-15


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(16, 6, 5), (15, 5, 5), (8, 2, 3), (4, 2, 1), (6, 3, 2), (2, 2, 0)]
)
def test_interleaved_outputs_are_the_transposed_convolution(kernel: int, stride: int, padding: int) -> None:
    conv = nn.ConvTranspose1d(8, 6, kernel, stride, padding, bias=False, dtype=torch.float64)
    x = torch.randn(2, 8, 19, dtype=torch.float64)
    assert relative_error(_interleaved(x, conv), conv(x)) <= 1e-15


@pytest.mark.parametrize("samples", [60, 47])
def test_even_lengths_make_dilated_convolutions_of_grids(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One behind the other, without views of what is between them; and a transposed one at the end."""
    monkeypatch.setattr(ops, "device_of", lambda x: torch.device("cuda"))
    monkeypatch.setattr(ops, "_is_channels_last", lambda device, dtype: True)
    convs = [nn.Conv1d(8, 8, 7, 1, 3 * each, each, bias=False, dtype=torch.float64) for each in (1, 3, 1, 5, 2)]
    up = nn.ConvTranspose1d(8, 6, 7, 3, 2, bias=False, dtype=torch.float64)
    x = torch.randn(2, 8, samples, dtype=torch.float64)
    even = ops.evened(x, samples, [1, 2, 3, 5])
    assert even == 60
    y = F.pad(x, (0, even - samples)).mT.contiguous().mT
    for conv in convs:
        x, made = conv(x), ops.even1d(y, conv).x
        assert made.shape[2:].numel() == even
        # What an activation leaves behind the samples.
        made = made.contiguous(memory_format=torch.channels_last)
        made.permute(0, 2, 3, 1).flatten(1, 2)[:, samples:] = 0.0
        assert relative_error(made.flatten(2)[:, :, :samples], x) <= 1e-14
        y = made
    grid = F.pad(x, (0, even - samples)).unsqueeze(2)
    assert relative_error(upsample1d(grid, up, samples).x, up(x)) <= 1e-14
    # Whatever happens to the weights, the next call takes them as they are.
    up.weight.data.mul_(-2.0)
    assert relative_error(upsample1d(grid, up, samples).x, up(x)) <= 1e-14


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this machine has no Triton")
def test_kernels_equal_their_definitions() -> None:
    errors = interpreted(_SCRIPT)
    assert len(errors) == 10
    for name, error in errors.items():
        # One rounding at the end, of 24 or of 11 bits; a sum that is kept is rounded before.
        assert error <= (3e-7 if "float32" in name or "view" in name else 3e-4), (name, error)


def test_snake_is_its_formula_and_has_gradients() -> None:
    x = torch.randn(2, 3, 50, dtype=torch.float64)
    act = Snake(3).double()
    nn.init.normal_(act.alpha), nn.init.normal_(act.beta)
    expected = x + torch.sin(act.alpha.exp() * x) ** 2 / (act.beta.exp() + 1e-9)
    assert relative_error(act(Sum(x)), expected) <= 1e-15
    with torch.no_grad():
        assert relative_error(act(Sum(x)), expected) <= 1e-15
        total, y = act.fork(Sum(x, 2 * x, torch.ones(3, dtype=torch.float64)))
        assert torch.equal(total, x + 2 * x + 1)
        assert torch.equal(y, snake(total, act.alpha, act.beta))
    assert torch.autograd.gradcheck(lambda x: snake(x, act.alpha, act.beta), (x[:1, :, :4].clone().requires_grad_(),))


def test_the_fused_pointwise_convolution_is_its_parts() -> None:
    act, conv, x = Snake(6), nn.Conv1d(6, 6, 1), torch.randn(2, 6, 20)
    expected = conv(snake(x, act.alpha, act.beta)) + 2 * x
    assert relative_error(snake_pointwise(Sum(x), act, conv, 2 * x).value(), expected) <= 1e-6


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(7, 1, 9, 3), (4, 2, 1, 1), (10, 5, 3, 1), (1, 1, 0, 1)]
)
def test_needs_are_what_a_convolution_reads(kernel: int, stride: int, padding: int, dilation: int) -> None:
    conv = nn.Conv1d(1, 1, kernel, stride, padding, dilation)
    x = torch.randn(1, 1, 60, requires_grad=True)
    y = conv1d(x, conv).value()
    assert torch.equal(y, conv(x))
    for at in range(10, y.shape[2] - 10) if stride == 1 else range(2, y.shape[2] - 2):
        (gradient,) = torch.autograd.grad(y[0, 0, at], x, retain_graph=True)
        read = gradient[0, 0].nonzero()[:, 0]
        assert needs(conv, at, at) == (int(read[0]), int(read[-1]))


@pytest.mark.parametrize("stride", [1, 2, 3, 8])
def test_needs_are_what_an_upsampling_reads(stride: int) -> None:
    conv = nn.ConvTranspose1d(1, 1, 2 * stride, stride, -(-stride // 2))
    x = torch.randn(1, 1, 20, requires_grad=True)
    y = upsample1d(x, conv).value()
    assert torch.equal(y, conv(x))
    for at in range(2 * stride, y.shape[2] - 2 * stride):
        (gradient,) = torch.autograd.grad(y[0, 0, at], x, retain_graph=True)
        read = gradient[0, 0].nonzero()[:, 0]
        assert needs(conv, at, at) == (int(read[0]), int(read[-1]))
