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

from bench_tools import Options, attempt, busiest, by_prefixes, cudnn_benchmark, error, measure, run_parts, timed
from fastvideo_vae_autoencoder_kl import SDXL, AutoencoderKL
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.graphs import Captured
from fastvideo_vae_core.ops.attention import in_blocks, prefix_attention
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
# Items, positions and channels of heads; a picture's sides need not make a number of positions that is even.
HEADS = {
    "SDXL 1024²": (1, 128**2, 512),
    "SDXL 1000²": (1, 125**2, 512),
    "SDXL 512²": (1, 64**2, 512),
    "SDXL 256²": (1, 32**2, 512),
    "SDXL 2048²": (1, 256**2, 512),
    "Wan 2.1 480 x 832": (21, 60 * 104, 384),
    "Wan 2.2 480 x 832": (21, 30 * 52, 1024),
    "Wan 2.2 704 x 1280": (21, 44 * 80, 1024),
}
SMALL_HEADS = {"even": (1, 128, 320), "odd": (3, 125, 320)}
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
    """One head of 512 channels over 128 x 128 and 256 x 256 positions, and as other families have it: fused kernels of
    PyTorch, what is shipped, and the products in other blocks, with PyTorch's softmax, and alone."""
    for name, (items, positions, channels) in SMALL_HEADS.items() if options.small else HEADS.items():
        q, k, v = torch.randn(3, items, 1, positions, channels, device=options.device, dtype=BF16)
        ways: dict[str, Callable[[], Tensor]] = {
            "fused, PyTorch's choice": partial(F.scaled_dot_product_attention, q, k, v),
            "shipped": partial(in_blocks, q, k, v),
        }
        if positions == 128**2 or options.small:
            for size in (32, 64, 256, 512):
                ways[f"blocks of {size} MiB"] = partial(in_blocks, q, k, v, scores=size << 20)
            for row in (4096, 8192):
                ways[f"rows of {row} keys"] = partial(in_blocks, q, k, v, row=row)
            for rows in (1024, 2048, 4096):
                ways[f"PyTorch's softmax, {rows} queries"] = partial(with_softmax, q, k, v, rows)
        elif positions == 256**2:
            ways["blocks of 256 MiB"] = partial(in_blocks, q, k, v, scores=256 << 20)
        compare(name, ways, q, k, v)
        if positions == 128**2 or options.small:
            products(q, k, v)
    frames, frame, channels = (2, 64, 320) if options.small else (9, 88 * 152, 512)
    q, k, v = torch.randn(3, 1, 1, frames * frame, channels, device=options.device, dtype=BF16)
    fused = partial(by_prefixes, F.scaled_dot_product_attention, q, k, v, frame)
    ways = {"fused, PyTorch's choice": fused, "shipped": lambda: prefix_attention(q, k, v, frame)}
    compare("GameCraft's prefixes", ways, q, k, v, share=(frames + 1) / (2 * frames))


def compare(
    name: str, ways: dict[str, Callable[[], Tensor]], q: Tensor, k: Tensor, v: Tensor, share: float = 1.0
) -> None:
    """Times, rates, memory, and the distance to float64 of the last queries, which see all keys.

    share: how much of all pairs of positions is computed.
    """
    print(f"{name}: {tuple(q.shape)}")
    seen = slice(-64, None)
    exact = F.scaled_dot_product_attention(q[:1, ..., seen, :].double(), k[:1].double(), v[:1].double())
    operations = 4 * q.numel() * k.shape[-2] * share
    for way, run in ways.items():
        ms, extra = attempt(run), 0.0
        if torch.cuda.is_available() and ms == ms:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            extra = (torch.cuda.max_memory_allocated() - before) / 2**20
        print(f"  {way:35} {ms:8.3f} ms {operations / ms / 1e9:6.0f} TFLOP/s {extra:6.0f} MiB", end="")
        print(f"  distance {error(run()[:1, ..., seen, :], exact):.2e}" if ms == ms else "", flush=True)


def products(q: Tensor, k: Tensor, v: Tensor) -> None:
    """The two products alone, for all queries in blocks: the second also with its sum cut, so that small blocks fill
    the device. Weights have gaps between their rows, as in what is shipped."""
    queries, (positions, channels) = q[0, 0], k.shape[-2:]
    for rows in (1024, 2048, 4096):
        scores = q.new_empty(rows, positions, dtype=torch.float32)
        weights = q.new_empty(rows, 2 * positions).uniform_()[:, :positions]
        for cuts in (0, 1, 2, 4):

            def run() -> None:
                for asked in queries.split(rows):
                    if not cuts:
                        torch.mm(asked, k[0, 0].T, out_dtype=torch.float32, out=scores)
                        continue
                    parts = weights.unflatten(1, (cuts, -1)).transpose(0, 1)
                    torch.bmm(parts, v[0, 0].unflatten(0, (cuts, -1)), out_dtype=torch.float32)

            ms = attempt(run)
            what = f"weights by values in {cuts}" if cuts else "queries by keys"
            rate = 2 * positions**2 * channels / ms / 1e9
            print(f"  {what + f', blocks of {rows}':35} {ms:8.3f} ms {rate:6.0f} TFLOP/s", flush=True)


def with_softmax(q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
    """Two products for some queries at a time, with PyTorch's softmax in float32 between."""
    made = torch.empty_like(q)
    for asked, into in zip(q[0, 0].split(rows), made[0, 0].split(rows), strict=True):
        asked = asked * q.shape[-1] ** -0.5
        if asked.is_cuda:
            scores = torch.mm(asked, k[0, 0].T, out_dtype=torch.float32)
        else:
            scores = asked.float() @ k[0, 0].T.float()
        torch.mm(scores.softmax(-1).to(q.dtype), v[0, 0], out=into)
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
