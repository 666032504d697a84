"""Convolutions over a clip in pieces against one convolution of everything, and the kernels that feed them."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.ops.clip import CausalConv, Clip, Reading, Run, convolved, repeated, upsampled
from fastvideo_vae_core.testing.interpreter import interpreted

CPU = torch.device("cpu")
CUTS = pytest.mark.parametrize("cut", [[7], [1] * 7, [1, 2, 4], [3, 1, 3], [1, 6]], ids=str)
STRIDES = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 1)]


def definition(conv: CausalConv, x: Tensor) -> Tensor:
    """One convolution over everything."""
    return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"), conv.conv.weight, conv.conv.bias, conv.conv.stride)


def a_clip(channels: int = 4) -> Tensor:
    return torch.randn(2, channels, 7, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def norm_of(channels: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(2, channels, eps=1e-6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@CUTS
@pytest.mark.parametrize("stride", STRIDES, ids=str)
@pytest.mark.parametrize("numbers", [None, 1, 2 * 5 * 6 * 5], ids=str)
def test_pieces_equal_the_whole(cut: list[int], stride: tuple[int, int, int], numbers: int | None) -> None:
    torch.manual_seed(0)
    conv, x = CausalConv(4, 5, stride=stride).double(), a_clip()
    clip = Clip(list(x.split(cut, 2)))
    made = Clip(list(convolved(clip, conv, Run(CPU, numbers)))).joined()
    assert clip.pieces == []
    assert torch.allclose(made, definition(conv, x), rtol=0, atol=1e-12)


@CUTS
@pytest.mark.parametrize("repeats", [(1, 2, 2), (2, 2, 2), (2, 1, 1)], ids=str)
def test_repetition_leaves_the_first_frame_one(cut: list[int], repeats: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    conv, x = CausalConv(4, 5).double(), a_clip()
    grown = x.repeat_interleave(repeats[1], 3).repeat_interleave(repeats[2], 4)
    grown = torch.cat([grown[:, :, :1], grown[:, :, 1:].repeat_interleave(repeats[0], 2)], 2)
    assert torch.equal(repeated(x, repeats, first=True), grown)
    made = upsampled(Clip(list(x.split(cut, 2))), conv, Run(CPU, 5 * 4 * 30), repeats)
    assert torch.allclose(Clip(list(made)).joined(), definition(conv, grown), rtol=0, atol=1e-12)


@CUTS
@pytest.mark.parametrize("pending", [False, True], ids=["settled", "pending bias"])
def test_norms_span_the_clip(cut: list[int], pending: bool) -> None:
    torch.manual_seed(0)
    conv, norm, x = CausalConv(4, 5).double(), norm_of(4), a_clip()
    bias = torch.randn(4, dtype=torch.float64) if pending else None
    settled = x if bias is None else x + bias.view(-1, 1, 1, 1)
    expected = definition(conv, F.silu(norm(settled)))
    clip, run = Clip([piece.clone() for piece in x.split(cut, 2)], bias), Run(CPU)
    made = Clip(list(convolved(clip, conv, run, Reading(norm, clip.moments(norm, run), bias)))).joined()
    assert torch.allclose(made, expected, rtol=0, atol=1e-12)
    assert torch.allclose(Clip([x.clone()], bias).joined(), settled, rtol=0, atol=0)


def test_what_was_read_can_go_before_it_is_convolved() -> None:
    conv, x = CausalConv(4, 5).double(), a_clip()
    seen: list[tuple[int, int]] = []
    made: list[Tensor] = []
    clip = Clip(list(x.split(2, 2)))
    for piece in convolved(clip, conv, Run(CPU), passed=lambda part: seen.append((part.shape[2], len(made)))):
        made.append(piece)
    assert seen == [(2, 0), (2, 1), (2, 2), (1, 3)]
    assert [piece.shape[2] for piece in made] == [2, 2, 2, 1]


def test_gradients_flow_through_the_pieces() -> None:
    torch.manual_seed(0)
    conv, norm = CausalConv(2, 2).double(), norm_of(2)
    x = torch.randn(1, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        clip = Clip(list(x.split([1, 2], 2)))
        reading = Reading(norm, clip.moments(norm, Run(CPU)))
        return Clip(list(convolved(clip, conv, Run(CPU), reading))).joined()

    assert torch.autograd.gradcheck(run, (x,))


_SCRIPT = """
import json, torch
from torch import nn
from fastvideo_vae_core.ops import clip
from fastvideo_vae_core.ops.clip import CausalConv, Clip, Reading, Run, convolved, upsampled
from fastvideo_vae_core.ops.kernels.group_norm import moments
from fastvideo_vae_core.ops.norm import Moments

# The fused path, which is for GPUs, on the interpreter: float32, so that it can be told from the definition.
clip._FUSED = (torch.float32,)
fused, plain = Run(torch.device("cuda"), 1), Run(torch.device("cpu"), 1)
assert Run(torch.device("cuda")).fuses(torch.zeros(1), torch.zeros(1))

def last(x):
    return x.contiguous(memory_format=torch.channels_last_3d)

def error(ours, reference):
    return float((ours - reference).norm() / reference.norm())

torch.manual_seed(0)
errors = {}
with torch.no_grad():
    for shape in ((1, 12, 5, 3, 5), (2, 12, 4, 4, 3), (1, 160, 3, 3, 3)):
        x, bias = last(torch.randn(shape) + 5), torch.randn(shape[1])
        norm = nn.GroupNorm(4, shape[1], eps=1e-6)
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        for pending in (None, bias):
            exact = x.double() if pending is None else x.double() + pending.double().view(-1, 1, 1, 1)
            ours, whole = moments(x, 4, pending), Moments.of(exact, 4)
            assert ours.size == whole.size
            errors[f"mean {shape} {pending is None}"] = error(ours.mean, whole.mean)
            errors[f"spread {shape} {pending is None}"] = error(ours.spread, whole.spread)
        for slots in (1, 3):
            for stride in ((1, 1, 1), (1, 2, 2), (2, 2, 2))[: 3 if slots == 1 else 2]:
                conv = CausalConv(shape[1], 4, stride=stride)
                conv.slots = slots
                for normed in (False, True):
                    pending = bias if normed else None
                    made = []
                    for run in (fused, plain):
                        pieces = Clip(list(x.clone().split([1, shape[2] - 2, 1], 2)), pending)
                        known = pieces.moments(norm, run) if normed else None
                        reading = Reading(norm, known, pending) if normed else None
                        made.append(Clip(list(convolved(pieces, conv, run, reading))).joined())
                    errors[f"{shape} {slots} {stride} {normed}"] = error(*made)
        conv = CausalConv(shape[1], 4)
        for repeats in ((2, 2, 2), (1, 2, 2), (2, 1, 1)):
            for cut in ([1, shape[2] - 2, 1], [shape[2]]):
                made = []
                for run in (fused, plain):
                    made.append(Clip(list(upsampled(Clip(list(x.split(cut, 2))), conv, run, repeats))).joined())
                errors[f"{shape} {repeats} {cut}"] = error(*made)
        for inner in ((True, False), (True, True)):
            keep = (..., *(slice(1, -1) if each else slice(None) for each in inner))
            whole = Clip(list(convolved(Clip([x]), conv, plain, Reading()))).joined()
            for name, run in (("fused", fused), ("plain", plain)):
                made = Clip(list(convolved(Clip([x]), conv, run, Reading(inner=inner)))).joined()
                errors[f"{shape} {inner} {name}"] = error(made, whole[keep])
        keep = (..., slice(2, -2), slice(None))
        whole = Clip(list(upsampled(Clip([x]), conv, plain, (2, 2, 2)))).joined()
        made = Clip(list(upsampled(Clip([x]), conv, fused, (2, 2, 2), (True, False)))).joined()
        errors[f"{shape} inner, upsampled"] = error(made, whole[keep])
print(json.dumps(errors))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this machine has no Triton")
def test_kernels_equal_their_definitions() -> None:
    errors = interpreted(_SCRIPT)
    assert len(errors) == 3 * (4 + 10 + 6 + 5)
    # A few units in the last place of float32, in the second convolution of sums around 5.
    assert max(errors.values()) < 1e-5, errors


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(7,), (1, 6), (3, 3, 1), (1,) * 7], ids=str)
def test_in_float32_on_a_gpu_any_pieces_have_the_same_statistics(sizes: tuple[int, ...]) -> None:
    """To the last bit: frame by frame, and not even the whole takes its own."""
    x, norm = 3 + torch.randn(1, 8, 7, 9, 11), nn.GroupNorm(2, 8)
    gpu = Run(torch.device("cuda"))
    expected = Clip([*x.split(1, 2)]).moments(norm, gpu)
    found = Clip([*x.split(list(sizes), 2)]).moments(norm, gpu)
    assert found is not None
    assert expected is not None
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.spread, expected.spread)
    assert Clip([x]).moments(norm, Run(torch.device("cpu"))) is None
