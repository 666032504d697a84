"""Train the miniature AutoencoderKLHunyuanVideo that ships with fastvideo-vae-gamecraft, on what packages carry.

    python tools/demo_clips.py --output .carry/wan-clips
    python tools/demo_photographs.py --output .carry/kl-photos
    python tools/train_demo_gamecraft.py train --clips .carry/wan-clips --photographs .carry/kl-photos --output out

`train` needs neither a network nor an installed workspace, only its sources on PYTHONPATH, and wants a GPU. `out/demo`
is then the package's `demo` folder; `out/held-out.png` and `out/log.txt` are for looking. See demo_training.py for
runs that were cut off, and for going on from them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demo_video
from demo_video import SMALL_STAGES, Miniature, Recipe, Stage
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.ops.attention import GridAttention
from fastvideo_vae_core.ops.clip import CausalConv, Pointwise, Run
from fastvideo_vae_gamecraft.config import HunyuanVideoArchConfig
from fastvideo_vae_gamecraft.model import AutoencoderKLHunyuanVideo
from fastvideo_vae_gamecraft.network import Decoder, Encoder, Level, Repeats, ResnetBlock

Bits = tuple[int, ...]

# The published network compresses 8 x 8 pixels and attends in its middle. Its kind of upsampling, by copies that a
# convolution then smooths, cannot make the finest details, so that halving the picture once loses least; and attention
# would then be of 127,000 positions for the clip that ships. One group: see `read_out`.
ARCH = HunyuanVideoArchConfig(
    block_out_channels=(24, 36, 48),
    down_block_types=("HunyuanVideoDownBlock3D",) * 3,
    up_block_types=("HunyuanVideoUpBlock3D",) * 3,
    layers_per_block=1,
    latent_channels=12,
    norm_num_groups=1,
    spatial_compression_ratio=2,
    mid_block_add_attention=False,
)
# One size of crops is compiled, and as long as the clip that ships.
STAGES = (
    Stage(until=0.6, frames=33, side=80, batch=3, l1=0.05, gradient=0.05),
    Stage(until=1.0, frames=33, side=80, batch=3),
)
# Means of three crops that were held out, on a CPU. From random weights 200 steps gave 17 dB, with 4 x 4 pixels to a
# latent as with 2 x 2. The transform below has 29.3 dB before the first step (4 x 4: 25.2 dB). 1.5e-3 ruins it (4 x 4:
# 16 dB after 150 steps); in 300 steps 3e-4 makes 30.3 dB of it, and 1e-4 30.9 dB. More and larger batches bear more.
LEARNING_RATE = 2e-4
RECIPES = {
    "large": Recipe(arch=ARCH, learning_rate=LEARNING_RATE, stages=STAGES),
    "polish": Recipe(arch=ARCH, learning_rate=LEARNING_RATE, stages=STAGES[1:]),
    "small": Recipe(arch=ARCH, learning_rate=LEARNING_RATE, stages=SMALL_STAGES),
}


def main(arguments: Sequence[str] | None = None) -> None:
    demo_video.main(MINIATURE, __doc__, arguments)


# ---------------------------------------------------------------- initialisation


def initialised(arch: HunyuanVideoArchConfig) -> AutoencoderKLHunyuanVideo:
    """A transform that is known to be good, from which training goes on; the rest begins small, as PyTorch has it.

    The encoder begins as a Haar transform of the colours that keeps the strongest bands, the decoder as what its
    upsampling can do to invert it, and residual blocks as the identity. Every band begins with a deviation of 1. The
    posterior begins narrow: at variance 1 the first latents would be lost in noise.
    """
    model = AutoencoderKLHunyuanVideo(VAEConfig(arch_config=arch))
    encoder, decoder = model.encoder, model.decoder
    assert isinstance(encoder, Encoder)
    assert isinstance(decoder, Decoder)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ResnetBlock):
                module.conv2.conv.weight.zero_()
            elif isinstance(module, GridAttention):
                for each in module.to_out.parameters():
                    each.zero_()
        bands = analysing(encoder, arch)
        synthesising(decoder, arch, bands)
        for conv in (model.quant_conv, model.post_quant_conv):
            connect(conv, [(i, i, ONE) for i in range(arch.latent_channels)])
        assert model.quant_conv.bias is not None
        model.quant_conv.weight[arch.latent_channels :] = 0
        model.quant_conv.bias[arch.latent_channels :] = -8
    for module in model.modules():
        if type(module) is CausalConv:
            module.__class__ = SideBySide
    return model


class Band(NamedTuple):
    """A part of what a block of pixels holds: one of COLOURS, and its frequency among frames, rows and columns, which
    counts the changes of sign in the block."""

    colour: int
    frequencies: tuple[int, int, int] = (0, 0, 0)

    def deviation(self, pixels: int) -> float:
        """What to expect for a block of so many pixels in an orthonormal transform: a model that fits natural video."""
        time, vertical, horizontal = (frequency**2 for frequency in self.frequencies)
        return 0.8 * math.sqrt(pixels * VARIANCES[self.colour] / (1 + 16 * time + 4 * (vertical + horizontal)))

    def halves(self, strides: Repeats) -> Iterator[tuple[Band, Bits]]:
        """What two neighbours along each axis with a stride make of it: for each axis their sum, 0, or difference, 1.

        Where neighbours had opposite signs, it is the difference that changes less often.
        """
        for bits in itertools.product(*(range(stride) for stride in strides)):
            known = zip(self.frequencies, bits, strides, strict=True)
            time, vertical, horizontal = (
                stride * f + (bit ^ (f & 1) if stride == 2 else 0) for f, bit, stride in known
            )
            yield Band(self.colour, (time, vertical, horizontal)), bits


def analysing(encoder: Encoder, arch: HunyuanVideoArchConfig) -> list[Band]:
    """Let the encoder give the strongest bands; these."""
    bands, pixels = [Band(colour) for colour in range(len(COLOURS))], 1
    convert = COLOURS / torch.tensor([[band.deviation(1)] for band in bands])
    connect(
        encoder.conv_in.conv, [(i, j, value * HERE) for i, row in enumerate(convert) for j, value in enumerate(row)]
    )
    for level, strides in zip(encoder.down_blocks, arch.strides, strict=True):
        shorten(level, len(bands), last=level is encoder.down_blocks[-1])
        for downsampler in level.downsamplers:
            made = [(half, bits, i) for i, band in enumerate(bands) for half, bits in band.halves(strides)]
            finer, pixels = pixels, pixels * math.prod(strides)
            made = sorted(made, key=lambda each: -each[0].deviation(pixels))[: arch.latent_channels]
            links = []
            for row, (half, bits, column) in enumerate(made):
                gain = bands[column].deviation(finer) / half.deviation(pixels)
                links.append((row, column, gain * outer(ANALYSIS, bits, strides)))
            connect(downsampler.conv.conv, links)
            bands = [half for half, _, _ in made]
    read_out(encoder, encoder.mid_block.resnets[-1], torch.eye(len(bands)))
    return bands


def synthesising(decoder: Decoder, arch: HunyuanVideoArchConfig, bands: list[Band]) -> None:
    """Let the decoder make pixels of these bands."""
    pixels = math.prod(math.prod(strides) for strides in arch.strides)
    connect(decoder.conv_in.conv, [(i, i, HERE) for i in range(len(bands))])
    for level, strides in zip(decoder.up_blocks, arch.strides, strict=True):
        shorten(level, len(bands), last=level is decoder.up_blocks[-1])
        for upsampler in level.upsamplers:
            coarser, pixels = pixels, pixels // math.prod(strides)
            finer = {half: (whole, bits) for whole in wholes(bands, strides) for half, bits in whole.halves(strides)}
            made = sorted({finer[band][0] for band in bands}, key=lambda band: -band.deviation(pixels))
            links = []
            for column, band in enumerate(bands):
                whole, bits = finer[band]
                gain = band.deviation(coarser) / whole.deviation(pixels)
                links.append((made.index(whole), column, gain * outer(SYNTHESIS, bits, strides)))
            connect(upsampler.conv.conv, links)
            bands = made
    scales = torch.tensor([band.deviation(1) for band in bands])
    read_out(decoder, decoder.up_blocks[-1].resnets[-1], COLOURS[[band.colour for band in bands]].T * scales)


def wholes(bands: Sequence[Band], strides: Repeats) -> set[Band]:
    """Of which these are halves."""
    return {
        Band(band.colour, tuple(f // stride for f, stride in zip(band.frequencies, strides, strict=True)))  # type: ignore[arg-type]
        for band in bands
    }


def shorten(level: Level, count: int, *, last: bool) -> None:
    """Let so many signals pass the first block of a level; the last level gives each of them and its negative."""
    shortcut = level.resnets[0].conv_shortcut
    if last:
        assert isinstance(shortcut, Pointwise), "the last two levels must differ in width"
        connect(shortcut.conv, [(2 * i + side, i, (1 - 2 * side) * ONE) for i in range(count) for side in (0, 1)])
    elif isinstance(shortcut, Pointwise):
        connect(shortcut.conv, [(i, i, ONE) for i in range(count)])


def read_out(half: Encoder | Decoder, before: ResnetBlock, matrix: Tensor) -> None:
    """Let the last norm and convolution of a half be a linear map of signals, of which there are pairs.

    SiLU is no obstacle: silu(x) - silu(-x) = x. A norm would make clips of all brightnesses and contrasts alike; beside
    pairs it sees no brightness, and beside two constants that are larger than any signal it sees no contrast.
    """
    norm, width = half.conv_norm_out, half.conv_norm_out.num_channels
    assert norm.num_groups == 1
    outputs, signals = matrix.shape
    assert 2 * signals + 2 <= width
    bias = before.conv2.conv.bias
    assert bias is not None
    bias[-2:] = torch.tensor([REFERENCE, -REFERENCE])
    norm.weight[:] = math.sqrt(2 * (REFERENCE**2 + signals) / width)
    # What is constant would be no more than a bias, and a lively one.
    norm.weight[-2:] = 0.1
    connect(
        half.conv_out.conv,
        [
            (row, 2 * i + side, (1 - 2 * side) * matrix[row, i] * HERE)
            for row in range(outputs)
            for i in range(signals)
            for side in (0, 1)
        ],
    )


def connect(conv: nn.Module, links: Sequence[tuple[int, int, Tensor]]) -> None:
    """Let the outputs that are named see only the inputs and taps that are given; others begin small. No bias."""
    assert isinstance(conv, nn.Conv3d)
    assert conv.bias is not None
    conv.weight.mul_(0.1)
    conv.bias.zero_()
    for output, _, _ in links:
        conv.weight[output] = 0
    for output, channel, taps in links:
        conv.weight[output, channel] = taps


def outer(filters: Mapping[str, Tensor], bits: Bits, strides: Repeats) -> Tensor:
    """The three-dimensional filter for a sum or difference along each axis that has a stride."""
    still = {"time": torch.tensor([0.0, 0.0, 1.0]), "space": torch.tensor([0.0, 1.0, 0.0])}
    axes = ("time", "space", "space")
    chosen = [
        filters[axis][bit] if stride == 2 else still[axis]
        for axis, bit, stride in zip(axes, bits, strides, strict=True)
    ]
    return torch.einsum("t, h, w -> thw", *chosen)


# Brightness, and two differences of colours, with their variances in natural pictures.
COLOURS = F.normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]]))
VARIANCES = (1.0, 0.06, 0.03)
# A single position, and what a causal convolution sees there.
ONE = torch.ones(1, 1, 1)
HERE = torch.zeros(3, 3, 3).index_put_([torch.tensor(at) for at in (2, 1, 1)], torch.tensor(1.0))
# Sum and difference of the pair that becomes one, which are the last two of three taps.
PAIR = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, -1.0]]) / math.sqrt(2)
ANALYSIS = {"time": PAIR, "space": PAIR}
# The closest to a pair again that three taps over positions that come twice can do, when neighbours differ at random;
# smooth sums in space, copies in time, where what comes next is not known.
SYNTHESIS = {
    "time": torch.tensor([[0.0, 0.0, 1.0], [0.5, -1.0, 0.5]]) / math.sqrt(2),
    "space": torch.tensor([[0.25, 0.5, 0.25], [-0.5, 0.0, 0.5]]) / math.sqrt(2),
}
REFERENCE = 16.0


# ---------------------------------------------------------------- networks


class SideBySide(CausalConv):
    """The same convolution, as one of pictures: the frames that it sees lie side by side in their channels.

    For as few channels as here that is several times as fast as a convolution in three dimensions.
    """

    def forward(self, data: Tensor, weight: Tensor, bias: Tensor | None, fused: bool, run: Run) -> Tensor:
        step, *around = self.conv.stride
        frames = 1 + (data.shape[2] - self.taps) // step
        windows = [data[:, :, tap : tap + 1 + step * (frames - 1) : step] for tap in range(self.taps)]
        pictures = torch.cat(windows, 1).transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        weight = weight.transpose(1, 2).flatten(1, 2)
        return F.conv2d(pictures, weight, bias, around).unflatten(0, (len(data), frames)).transpose(1, 2)


def with_statistics(
    arch: HunyuanVideoArchConfig, state: dict[str, Tensor], mean: Tensor, std: Tensor
) -> tuple[HunyuanVideoArchConfig, dict[str, Tensor]]:
    """The family scales all channels alike, and shifts none."""
    return replace(arch, scaling_factor=round(1 / float((std.square() + mean.square()).mean().sqrt()), 4)), state


def describe(arch: HunyuanVideoArchConfig) -> str:
    time, side = arch.temporal_compression_ratio, arch.spatial_compression_ratio
    return (
        f"the network of HunyuanVideo and Hunyuan-GameCraft at widths {'-'.join(map(str, arch.block_out_channels))},"
        f" {arch.latent_channels} latent channels, one latent for {time} frames of {side} × {side} pixels"
    )


MINIATURE = Miniature(
    script="train_demo_gamecraft.py",
    class_name="AutoencoderKLHunyuanVideo",
    model=AutoencoderKLHunyuanVideo,
    arch=HunyuanVideoArchConfig,
    recipes=RECIPES,
    initialised=initialised,
    with_statistics=with_statistics,
    describe=describe,
)

if __name__ == "__main__":
    main()
