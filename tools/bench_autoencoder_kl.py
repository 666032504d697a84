"""Where the time of AutoencoderKL goes on a GPU: SDXL at 1024 x 1024 in bfloat16, end to end, then layer by layer.

Run from the repository's root; with `--seconds` it leaves out what no longer fits. How it compares with diffusers is
the GPU suite's to say.
"""

# ruff: noqa: B023 - functions are timed where they are made, before the loop goes on.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench_tools import Options, attempt, busiest, cudnn_benchmark, error, measure, run_parts, timed
from fastvideo_vae_autoencoder_kl import SDXL, AutoencoderKL
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.graphs import Captured
from fastvideo_vae_core.ops.nearest import Nearest
from fastvideo_vae_core.ops.norm import group_norm_act

BF16 = torch.bfloat16
# Input and output channels, height and width, how often the decoder has it.
CONVOLUTIONS = [
    (4, 512, 128, 1),
    (512, 512, 128, 10),
    (512, 512, 256, 7),
    (512, 512, 512, 1),
    (512, 256, 512, 1),
    (256, 256, 512, 5),
    (256, 256, 1024, 1),
    (256, 128, 1024, 1),
    (128, 128, 1024, 5),
    (128, 3, 1024, 1),
]
UPSAMPLINGS = [(512, 128), (512, 256), (256, 512)]


def main() -> None:
    parts: dict[str, Callable[[Options], None]] = {
        "end_to_end": end_to_end,
        "profile": profile,
        "attention": attention,
        "upsampling": upsampling,
        "convolutions": convolutions,
        "norms": norms,
    }
    run_parts(__doc__, parts)


def end_to_end(options: Options) -> None:
    """Times and peaks, as it is, with cuDNN's own search, and recorded as a graph."""
    model, z, x = example(options)
    for on in (False, True):
        with cudnn_benchmark(on):
            measure(f"decode, cuDNN's search {on}", lambda: model.decode(z))
            measure(f"encode, cuDNN's search {on}", lambda: model.encode(x))
    if torch.cuda.is_available():
        for name, plan, call in (
            ("decode", model.plan_decode(z.shape), z),
            ("encode", model.plan_encode(x.shape), x),
        ):
            captured = Captured(model, plan)
            measure(f"{name}, a graph", lambda: captured(call))


def profile(options: Options) -> None:
    """The kernels that take the time."""
    model, z, x = example(options)
    busiest("decode", lambda: model.decode(z))
    busiest("encode", lambda: model.encode(x))


def attention(options: Options) -> None:
    """One head of 512 channels over 128 x 128 positions: PyTorch's kernels, and plain products in blocks of queries."""
    positions, channels = (64, 16) if options.small else (128**2, 512)
    q, k, v = torch.randn(3, 1, 1, positions, channels, device=options.device, dtype=BF16)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    ways: dict[str, Callable[[], Tensor]] = {"default": lambda: F.scaled_dot_product_attention(q, k, v)}
    for rows in (1024, 2048, 4096, positions):
        for wide in (False, True):
            name = f"blocks of {rows}, scores in {'float32' if wide else 'bfloat16'}"
            ways[name] = partial(in_blocks, q, k, v, rows, wide=wide)
    for name, way in ways.items():
        ms = attempt(way)
        rate = 4 * positions**2 * channels / ms / 1e9
        print(f"{name:40} {ms:8.3f} ms {rate:6.0f} TFLOP/s", end="")
        print(f"  distance {error(way(), exact):.1e}" if ms == ms else "", flush=True)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            print(f"{backend.name.lower():40} {attempt(lambda: F.scaled_dot_product_attention(q, k, v)):8.3f} ms")


def in_blocks(q: Tensor, k: Tensor, v: Tensor, rows: int, *, wide: bool) -> Tensor:
    """Attention as two products with a softmax between, for some queries at a time; `wide` scores are in float32."""
    made = torch.empty_like(q)
    keys = k[0, 0].T
    for asked, into in zip(q[0, 0].split(rows), made[0, 0].split(rows), strict=True):
        asked = asked * q.shape[-1] ** -0.5
        if wide and asked.is_cuda:
            scores = torch.mm(asked, keys, out_dtype=torch.float32).softmax(-1)
        else:
            scores = (asked @ keys).softmax(-1, dtype=torch.float32 if wide else None)
        torch.mm(scores.to(q.dtype), v[0, 0], out=into)
    return made


def upsampling(options: Options) -> None:
    """Nearest neighbours and a convolution; folded into one on the small grid; as a transposed convolution."""
    for channels, side in UPSAMPLINGS[:1] if options.small else UPSAMPLINGS:
        channels, side = (16, 8) if options.small else (channels, side)
        x = grid(options, channels, side)
        conv = convolution(options, channels, channels)
        weight, bias = conv.weight, conv.bias
        assert bias is not None
        nearest = Nearest()
        grown_already = nearest(x)
        quarters = folded(weight)
        together = quarters.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        transposed = as_transposed(quarters).contiguous(memory_format=torch.channels_last)
        biases = bias.repeat(4)

        def in_quarters() -> Tensor:
            made = F.conv2d(x, together, biases, padding=1)
            grown = x.new_empty(1, 2 * side, 2 * side, channels).movedim(-1, 1)
            for index in range(4):
                down, right = divmod(index, 2)
                part = made[:, index * channels : (index + 1) * channels]
                grown[:, :, down::2, right::2] = part[:, :, down : down + side, right : right + side]
            return grown

        exact = F.conv2d(F.interpolate(x.float(), scale_factor=2.0), weight.float(), bias.float(), padding=1)
        ways: dict[str, Callable[[], Tensor]] = {
            "nearest, then a convolution": lambda: conv(nearest(x)),
            "the convolution alone": lambda: conv(grown_already),
            "in quarters": in_quarters,
            "transposed": lambda: F.conv_transpose2d(x, transposed, bias, stride=2, padding=1),
        }
        for name, way in ways.items():
            ms = attempt(way)
            rate = 72 * channels**2 * side**2 / ms / 1e9
            print(f"{channels} {side}² {name:30} {ms:8.3f} ms {rate:6.0f} TFLOP/s", end="")
            print(f"  distance {error(way(), exact):.1e}", flush=True)


def folded(weight: Tensor) -> Tensor:
    """(4, O, I, 2, 2): for each of the four pixels of one, the taps that see the same pixel added up."""
    wide = weight.float()

    def halves(w: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        a, b, c = w.unbind(axis)
        return torch.stack([a, b + c], axis), torch.stack([a + b, c], axis)

    return torch.stack([each for rows in halves(wide, 2) for each in halves(rows, 3)]).to(weight.dtype)


def as_transposed(quarters: Tensor) -> Tensor:
    """(I, O, 4, 4) for a transposed convolution of stride 2 and padding 1."""
    made = quarters.new_empty(quarters.shape[2], quarters.shape[1], 4, 4)
    for index, each in enumerate(quarters):
        down, right = divmod(index, 2)
        # Tap (u, v) of a transposed convolution goes from pixel i to 2i + u - 1.
        flipped = each.flip(2, 3).transpose(0, 1)
        made[:, :, 1 - down :: 2, 1 - right :: 2] = flipped
    return made


def convolutions(options: Options) -> None:
    """Every 3 x 3 convolution of the decoder."""
    whole = 0.0
    for before, after, side, count in CONVOLUTIONS[:1] if options.small else CONVOLUTIONS:
        side = 8 if options.small else side
        x, conv = grid(options, before, side), convolution(options, before, after)
        times = []
        for on in (False, True):
            with cudnn_benchmark(on):
                times.append(timed(lambda: conv(x)))
        rates = " ".join(f"{18 * before * after * side**2 / ms / 1e9:6.0f}" for ms in times)
        whole += times[0] * count
        print(f"{before} -> {after}, {side}², {count} times: {rates} TFLOP/s, {times[0] * count:.2f} ms", flush=True)
    print(f"together {whole:.1f} ms")


def norms(options: Options) -> None:
    """Group norm and SiLU, beside a copy of the same size."""
    for channels, side in ((64, 8),) if options.small else ((512, 128), (512, 256), (256, 512), (128, 1024)):
        x = grid(options, channels, side)
        norm = nn.GroupNorm(32, channels, device=options.device, dtype=BF16).requires_grad_(False)
        other = torch.empty_like(x)
        ours, copied = timed(lambda: group_norm_act(x, norm, F.silu)), timed(lambda: other.copy_(x))
        print(f"{channels} {side}²: {ours:.3f} ms, a copy {copied:.3f} ms", flush=True)


def example(options: Options) -> tuple[AutoencoderKL, Tensor, Tensor]:
    """The published network with random weights, latents and a picture."""
    arch = replace(SDXL, block_out_channels=(32,) * 4, layers_per_block=1) if options.small else SDXL
    side = 8 if options.small else 128
    with torch.device(options.device):
        model = AutoencoderKL(VAEConfig(arch_config=arch)).to(BF16).eval().requires_grad_(False)
        return model, torch.randn(1, 4, side, side, dtype=BF16), torch.rand(1, 3, 8 * side, 8 * side, dtype=BF16)


def grid(options: Options, channels: int, side: int) -> Tensor:
    x = torch.randn(1, channels, side, side, device=options.device, dtype=BF16)
    return x.contiguous(memory_format=torch.channels_last)


def convolution(options: Options, before: int, after: int) -> nn.Conv2d:
    conv = nn.Conv2d(before, after, 3, padding=1, device=options.device, dtype=BF16).requires_grad_(False)
    return conv.to(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
