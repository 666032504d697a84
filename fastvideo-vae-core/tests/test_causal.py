"""Causal convolutions in pieces against one convolution of everything, and the kernels that feed them."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo_vae_core.ops.causal import Cache, CausalConv3d, norm_silu_conv, rows_of
from fastvideo_vae_core.ops.rms_norm import Modulation, PixelNorm, RMSNorm, pixel_norm_silu, rms_norm_silu
from fastvideo_vae_core.sharding import Sharding
from fastvideo_vae_core.strips import Strip
from fastvideo_vae_core.testing.interpreter import interpreted
from fastvideo_vae_core.testing.ranks import on_ranks

FORMULATIONS = pytest.mark.parametrize("stacked", [False, True], ids=["conv3d", "windows"])


def definition(conv: CausalConv3d, x: Tensor) -> Tensor:
    """One convolution over everything, with zeros in front."""
    _, height, width = conv.padding
    padded = F.pad(x, (width, width, height, height, conv.memory, 0))
    return F.conv3d(padded, conv.weight, conv.bias, conv.stride)


@FORMULATIONS
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (2, 3, 3)], ids=str)
@pytest.mark.parametrize("cut", [[7], [1] * 7, [1, 2, 4], [3, 1, 3], [1, 6]], ids=str)
def test_pieces_equal_the_whole(stacked: bool, kernel: tuple[int, int, int], cut: list[int]) -> None:
    torch.manual_seed(0)
    conv, x = CausalConv3d(3, 5, kernel).double(), torch.randn(2, 3, 7, 4, 6, dtype=torch.float64)
    conv.stacked = stacked or kernel[1:] == (1, 1)
    cache = Cache(x.device)
    made = torch.cat([conv(piece, cache) for piece in x.split(cut, 2)], 2)
    assert torch.allclose(made, definition(conv, x), rtol=0, atol=1e-12)


@FORMULATIONS
def test_a_strided_layer_begins_with_the_last_frame_it_kept(stacked: bool) -> None:
    torch.manual_seed(0)
    conv, x = CausalConv3d(3, 5, (3, 1, 1), stride=2).double(), torch.randn(2, 3, 9, 4, 6, dtype=torch.float64)
    conv.stacked = stacked
    cache = Cache(x.device)
    cache.keep(conv, rows_of(x[:, :, :1]))
    made = torch.cat([conv(piece, cache) for piece in x[:, :, 1:].split([2, 4, 2], 2)], 2)
    assert torch.allclose(made, F.conv3d(x, conv.weight, conv.bias, conv.stride), rtol=0, atol=1e-12)


def surrounded(conv: CausalConv3d, x: Tensor) -> Tensor:
    """One convolution over everything, with copies of the first and last frames around it, and reflections."""
    rows, columns = conv.inset(Cache(x.device))
    x = F.pad(x, (0, 0, 0, 0, conv.memory - conv.ahead, conv.ahead), mode="replicate")
    x = F.pad(x, (columns, columns, rows, rows, 0, 0), mode="reflect") if rows else x
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, conv.padding)


@FORMULATIONS
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("border", ["zeros", "reflect"])
@pytest.mark.parametrize("cut", [[7], [1] * 7, [1, 0, 2, 4], [3, 1, 3, 0], [1, 6]], ids=str)
def test_pieces_with_copies_around_them_equal_the_whole(
    stacked: bool, ahead: int, border: Literal["zeros", "reflect"], cut: list[int]
) -> None:
    """Outputs come as many frames late as they see later ones, and the piece that is the last brings the rest."""
    torch.manual_seed(0)
    conv = CausalConv3d(3, 5, edge="copies", ahead=ahead, border=border).double()
    x = torch.randn(2, 3, 7, 4, 6, dtype=torch.float64)
    conv.stacked = stacked
    cache, made = Cache(x.device), list[Tensor]()
    for index, piece in enumerate(pieces := x.split(cut, 2)):
        cache.last = index == len(pieces) - 1
        made.append(conv(piece, cache))
        seen, done = sum(cut[: index + 1]), sum(each.shape[2] for each in made)
        assert done == (seen if cache.last else seen - ahead)
    assert torch.allclose(torch.cat(made, 2), surrounded(conv, x), rtol=0, atol=1e-12)


@FORMULATIONS
def test_output_channels_in_the_order_of_positions(stacked: bool) -> None:
    """An arranged layer gives them position by position, and its weights keep their shape and order."""
    torch.manual_seed(0)
    conv, x = CausalConv3d(3, 8, edge="copies", positions=4).double(), torch.randn(1, 3, 3, 4, 5, dtype=torch.float64)
    conv.stacked = stacked
    weight, plain = conv.weight.detach().clone(), conv(x, Cache(x.device))
    conv.arrange()
    assert torch.equal(conv.weight, weight)
    ordered = conv(x, Cache(x.device)).unflatten(1, (4, 2)).transpose(1, 2).flatten(1, 2)
    assert torch.allclose(ordered, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cut", [[6], [1] * 6, [2, 0, 3, 1, 0]], ids=str)
def test_a_sum_with_what_is_ahead_of_it(cut: list[int]) -> None:
    """Two convolutions that are late, and their input, which waits for them."""
    torch.manual_seed(0)
    norm, layer = PixelNorm(1e-8), torch.nn.Module()
    first, second = (CausalConv3d(3, 3, edge="copies", ahead=1).double() for _ in range(2))
    x = torch.randn(2, 3, 6, 4, 4, dtype=torch.float64)
    cache, made = Cache(x.device), list[Tensor]()
    for index, piece in enumerate(pieces := x.split(cut, 2)):
        cache.last = index == len(pieces) - 1
        h = norm_silu_conv(norm_silu_conv(piece, norm, first, cache), norm, second, cache)
        made.append(h.plus_late(piece, layer, cache))

    def activated(y: Tensor) -> Tensor:
        return F.silu(y / (y.square().mean(1, keepdim=True) + 1e-8).sqrt())

    expected = x + surrounded(second, activated(surrounded(first, activated(x))))
    assert torch.allclose(torch.cat(made, 2), expected, rtol=0, atol=1e-12)
    assert cache.take(layer) is None


def test_a_layer_begins_once_in_a_video() -> None:
    cache, layer = Cache(torch.device("cpu")), torch.nn.Module()
    assert cache.begins(layer)
    other = cache.copy()
    assert not cache.begins(layer)
    assert not other.begins(layer)
    assert Cache(torch.device("cpu")).begins(layer)


@FORMULATIONS
def test_the_order_of_the_weights_in_memory_does_not_matter(stacked: bool) -> None:
    torch.manual_seed(0)
    conv, x = CausalConv3d(3, 5).double(), torch.randn(1, 3, 4, 4, 6, dtype=torch.float64)
    conv.stacked = stacked
    before = conv(x, Cache(x.device))
    shape, weight = conv.weight.shape, conv.weight.detach().clone()
    conv.arrange()
    assert conv.weight.shape == shape
    assert torch.equal(conv.weight, weight)
    assert torch.allclose(conv(x, Cache(x.device)), before, rtol=0, atol=1e-12)


def test_the_last_piece_leaves_nothing_in_the_cache() -> None:
    conv, x = CausalConv3d(3, 5), torch.randn(1, 3, 4, 4, 6)
    cache = Cache(x.device)
    conv(x, cache)
    assert cache.take(conv) is not None
    assert cache.take(conv) is None
    cache.last = True
    conv(x, cache)
    assert cache.take(conv) is None


def test_gradients_flow_through_the_windows() -> None:
    torch.manual_seed(0)
    norm, conv = RMSNorm(3, axes=3).double(), CausalConv3d(3, 2).double()
    x = torch.randn(1, 3, 4, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        cache = Cache(x.device)
        pieces = [norm_silu_conv(piece, norm, conv, cache).plus(0 * piece[:, :2]) for piece in x.split([1, 3], 2)]
        return torch.cat(pieces, 2)

    assert torch.autograd.gradcheck(run, (x,))


def test_the_norm_is_that_of_its_definition() -> None:
    rows, gamma = torch.randn(4, 5, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    expected = F.normalize(rows, dim=-1) * 7**0.5 * gamma
    assert torch.allclose(rms_norm_silu(rows, gamma), F.silu(expected), rtol=0, atol=1e-14)
    assert torch.equal(rms_norm_silu(torch.zeros(2, 7), gamma.float()), torch.zeros(2, 7))


def test_the_pixel_norm_is_that_of_its_definition() -> None:
    rows, scale, shift = (torch.randn(size, dtype=torch.float64) for size in ((2, 3, 4, 5, 7), (2, 7), (2, 7)))
    normal = rows / (rows.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    assert torch.allclose(pixel_norm_silu(rows, 1e-3), F.silu(normal), rtol=0, atol=1e-14)
    moved = normal * (1 + scale[:, None, None, None]) + shift[:, None, None, None]
    made = pixel_norm_silu(rows, 1e-3, Modulation(scale, shift))
    assert torch.allclose(made, F.silu(moved), rtol=0, atol=1e-14)


_SCRIPT = """
import json, torch
from fastvideo_vae_core.ops.causal import Cache, CausalConv3d, rows_of
from fastvideo_vae_core.ops.kernels.rms_norm import add_, norm_silu_into
from fastvideo_vae_core.ops.rms_norm import Modulation, pixel_norm_silu, rms_norm_silu

torch.manual_seed(0)
errors = {}
with torch.no_grad():
    for shape in ((1, 12, 1, 3, 5), (2, 12, 4, 3, 5), (1, 40, 3, 9, 8), (1, 1024, 2, 2, 3)):
        for stacked in (False, True):
            conv, cache = CausalConv3d(shape[1], 4), Cache(torch.device("cpu"))
            conv.stacked = stacked
            x = torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)
            gamma, bias = torch.randn(2, shape[1])
            for history in (None, torch.randn(shape[0], 2, *shape[3:], shape[1])):
                if history is not None:
                    cache.keep(conv, history)
                window = conv.window(x, cache)
                if history is not None:
                    cache.keep(conv, history)
                expected = conv.window(x, cache)
                window.data.nan_to_num_(nan=0.0)
                norm_silu_into(window.data, rows_of(x), gamma, bias, taps=window.taps, shift=window.shift)
                expected.write(rms_norm_silu((rows_of(x) + bias).double(), gamma.double()).float())
                errors[f"{shape} {stacked} {history is None}"] = float((window.data - expected.data).abs().max())
        for stacked in (False, True):
            for border in ("zeros", "reflect"):
                cache = Cache(torch.device("cpu"))
                conv = CausalConv3d(shape[1], 4, edge="copies", ahead=1, border=border)
                conv.stacked, cache.last = stacked, True
                modulation = Modulation(*torch.randn(2, shape[0], shape[1])) if stacked else None
                window, expected = conv.window(x, cache), conv.window(x, cache)
                rows = rows_of(x)
                norm_silu_into(window.data, rows, None, bias, taps=window.taps, shift=window.shift, inset=window.inset,
                               eps=1e-6, modulation=modulation)
                expected.write(pixel_norm_silu((rows + bias).double(), 1e-6, modulation).float())
                window.close(), expected.close()
                errors[f"pixel {shape} {stacked} {border}"] = float((window.data - expected.data).abs().max())
        y, other = rows_of(x).clone(), torch.randn_like(rows_of(x))
        add_(y, bias, other)
        errors[f"add {shape}"] = float((y - (rows_of(x) + bias + other)).abs().max())
print(json.dumps(errors))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this machine has no Triton")
def test_kernels_equal_their_definitions() -> None:
    errors = interpreted(_SCRIPT)
    assert len(errors) == 36
    # A few units in the last place of float32.
    assert max(errors.values()) < 1e-5, errors


@FORMULATIONS
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("axis", [1, 2], ids=["rows", "columns"])
@pytest.mark.parametrize("border", ["zeros", "reflect"])
def test_strips_of_several_ranks_equal_the_whole(
    stacked: bool, world: int, axis: int, border: Literal["zeros", "reflect"]
) -> None:
    """Two convolutions in a row, in pieces, over fewer and more ranks than there are rows."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 4, 4, dtype=torch.float64)
    layers = [CausalConv3d(3, 3, edge="copies", ahead=ahead, border=border).double() for ahead in (1, 0)]
    layers.append(CausalConv3d(3, 3, border=border).double())
    for layer in layers:
        layer.requires_grad_(False)
        layer.stacked = stacked

    def run(cache: Cache) -> Tensor:
        made = []
        for index, piece in enumerate(pieces := x.split([2, 0, 3, 1], 2)):
            cache.last = index == len(pieces) - 1
            y = cache.own(piece)
            for layer in layers:
                y = layer(y, cache)
            made.append(y)
        return torch.cat(made, 2)

    def on_rank(group: Any) -> Tensor:
        strip = Strip(Sharding(group=group, axis=axis, timeout=20), 4)
        return x.narrow(2 + axis, 0, 0) if strip.empty else run(Cache(x.device, strip))

    made = torch.cat(on_ranks(world, on_rank), 2 + axis)
    assert torch.allclose(made, run(Cache(x.device)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_a_strip_is_widened_gathered_and_cut(world: int) -> None:
    x = torch.arange(2 * 9 * 2, dtype=torch.float64).view(1, 1, 2, 9, 2)

    def on_rank(group: Any) -> list[Tensor]:
        cache = Cache(x.device, strip := Strip(Sharding(group=group, axis=1, timeout=20), 3))
        own = cache.own(x)
        if strip.empty:
            return [own]
        wide = cache.widened(own, 1, 2)
        latents = own[:, :, :, ::3]
        return [own, wide, cache.narrowed(wide, 1, 2), cache.gathered(latents)]

    found = on_ranks(world, on_rank)
    assert torch.equal(torch.cat([own for own, *_ in found], 3), x)
    start = 0
    for own, *others in found:
        stop = start + own.shape[3]
        if others:
            wide, narrow, whole = others
            assert torch.equal(wide, x[:, :, :, max(start - 1, 0) : stop + 2])
            assert torch.equal(narrow, own)
            assert torch.equal(whole, x[:, :, :, ::3])
        start = stop
