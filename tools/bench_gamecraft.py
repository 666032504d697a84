"""Where the time of GameCraft's autoencoder goes on a GPU: end to end, then layer by layer.

Run from the repository's root; with `--seconds` it leaves out what no longer fits. Every part stands for itself: one
that fails says so, and the others go on. How it compares with diffusers is the GPU suite's to say.
"""

# ruff: noqa: B023 - functions are timed where they are made, before the loop goes on.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from bench_tools import Options, busiest, by_prefixes, error, measure, run_parts, timed
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.ops.attention import in_blocks, prefix_attention
from fastvideo_vae_core.ops.clip import CausalConv, Clip, Reading, Run, convolved, upsampled
from fastvideo_vae_gamecraft.config import GAMECRAFT
from fastvideo_vae_gamecraft.model import AutoencoderKLHunyuanVideo

BF16 = torch.bfloat16

# Input and output channels, frames, height, width: the layers that take the time, at 704 x 1216.
CONVOLUTIONS = [
    (128, 128, 4, 704, 1216),
    (256, 128, 4, 704, 1216),
    (128, 3, 4, 704, 1216),
    (3, 128, 4, 704, 1216),
    (256, 256, 17, 352, 608),
    (512, 256, 8, 352, 608),
    (512, 512, 9, 176, 304),
    (512, 512, 9, 88, 152),
    (16, 512, 9, 88, 152),
]
# Channels, frames, height and width of the input, repetitions.
UPSAMPLINGS = [
    (512, 9, 88, 152, (1, 2, 2)),
    (512, 4, 176, 304, (2, 2, 2)),
    (256, 2, 352, 608, (2, 2, 2)),
]


def main() -> None:
    parts: dict[str, Callable[[Options], None]] = {
        "end_to_end": end_to_end,
        "profile": profile,
        "attention": attention,
        "convolutions": convolutions,
        "upsampling": upsampling,
    }
    run_parts(__doc__, parts)


def end_to_end(options: Options) -> None:
    """Times and peaks of whole clips, in bfloat16, for every number of latent frames at a time that may pay."""
    model, z, x = clip(options)
    for chunk in (1, 2, 3):
        for name, run, plan in (
            ("decode", model.decode, model.plan_decode(z.shape, chunk=chunk)),
            ("encode", model.encode, model.plan_encode(x.shape, chunk=chunk)),
        ):
            measure(f"{name} chunk {chunk}", partial(run, z if name == "decode" else x, plan=plan))


def profile(options: Options) -> None:
    """The kernels that take the time."""
    model, z, x = clip(options)
    busiest("decode", lambda: model.decode(z))
    busiest("encode", lambda: model.encode(x))


def attention(options: Options) -> None:
    """Nine frames of 88 x 152: what is shipped for each prefix, or the same products in blocks of other sizes."""
    frames, frame, width = (2, 6, 16) if options.small else (9, 88 * 152, 512)
    q, k, v = (torch.randn(1, 1, frames * frame, width, device=options.device, dtype=BF16) for _ in range(3))
    ways: dict[str, Callable[[], Tensor]] = {"shipped": lambda: prefix_attention(q, k, v, frame)}
    for size in (32, 64, 256):
        ways[f"blocks of {size} MiB"] = partial(by_prefixes, partial(in_blocks, scores=size << 20), q, k, v, frame)
    exact = prefix_attention(q[..., : 2 * frame, :].float(), k.float(), v.float(), frame)
    operations = 2 * frame**2 * frames * (frames + 1) * width
    for name, way in ways.items():
        ms = timed(way, least=2)
        print(f"{name:20} {ms:9.1f} ms {operations / ms / 1e9:6.0f} TFLOP/s", end="  ")
        print(f"distance to float32 {error(way()[..., : 2 * frame, :], exact):.1e}")


def convolutions(options: Options) -> None:
    """Norm, SiLU and convolution of one piece: frames side by side in the channels, or a convolution in 3-D. The first
    number is the convolution alone."""
    for before, after, frames, height, width in CONVOLUTIONS[:1] if options.small else CONVOLUTIONS:
        if options.small:
            frames, height, width = 2, 8, 6
        x = piece(options, before, frames, height, width)
        norm = nn.GroupNorm(before if before < 32 else 32, before, device=options.device, dtype=BF16)
        run = Run(torch.device(options.device))
        moments = Clip([x]).moments(norm, run)
        operations = 54 * before * after * frames * height * width
        for slots in (1, 3):
            conv = CausalConv(before, after).to(options.device, BF16)
            conv.slots = slots
            weight = conv.conv.weight
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)
            weight.requires_grad_(False)
            rows = (1, frames + 3 - slots, height + 2, width + 2, slots * before)
            window = torch.randn(rows, device=options.device, dtype=BF16)
            alone = timed(lambda: conv(window, None, True))
            whole = timed(lambda: list(convolved(Clip([x]), conv, run, Reading(norm, moments), bias=False)))
            what = f"{before} -> {after}, {frames} x {height} x {width}, {slots} side by side"
            print(f"{what:55} {operations / alone / 1e9:6.0f} {operations / whole / 1e9:6.0f} TFLOP/s {whole:8.2f} ms")


def upsampling(options: Options) -> None:
    """Folded into the convolution, or repeated before it. Operations are those of the latter."""
    for channels, frames, height, width, repeats in UPSAMPLINGS[:1] if options.small else UPSAMPLINGS:
        if options.small:
            frames, height, width = 2, 8, 6
        x = piece(options, channels, frames, height, width)
        conv = CausalConv(channels, channels).to(options.device, BF16).requires_grad_(False)
        conv.conv.weight.data = conv.conv.weight.data.contiguous(memory_format=torch.channels_last_3d)
        run = Run(torch.device(options.device))
        grown = frames * repeats[0] * height * repeats[1] * width * repeats[2]
        for name, way in (
            ("folded", lambda: list(upsampled(Clip([x]), conv, run, repeats))),
            ("repeated", lambda: list(convolved(Clip([x]), conv, run, Reading(repeats=repeats)))),
        ):
            ms = timed(way)
            rate = 54 * channels**2 * grown / ms / 1e9
            print(f"{channels}, {frames} x {height} x {width} by {repeats}, {name}: {ms:.2f} ms, {rate:.0f} TFLOP/s")


def clip(options: Options) -> tuple[AutoencoderKLHunyuanVideo, Tensor, Tensor]:
    """The published network with random weights, latents, and the video of that size."""
    arch = GAMECRAFT if not options.small else replace(GAMECRAFT, block_out_channels=(32,) * 4, layers_per_block=1)
    with torch.device(options.device):
        model = AutoencoderKLHunyuanVideo(VAEConfig(arch_config=arch)).to(BF16).eval().requires_grad_(False)
        z = torch.randn(1, 16, *((4, 2, 3) if options.small else (9, 88, 152)), dtype=BF16)
        return model, z, torch.rand(model.decoded_shape(z.shape), dtype=BF16) * 2 - 1


def piece(options: Options, channels: int, frames: int, height: int, width: int) -> Tensor:
    x = torch.randn(1, channels, frames, height, width, device=options.device, dtype=BF16)
    return x.contiguous(memory_format=torch.channels_last_3d)


if __name__ == "__main__":
    main()
