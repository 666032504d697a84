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
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demo_video
from demo_video import POLISH_STAGES, SMALL_STAGES, Miniature, Recipe, orthogonal
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.ops.attention import GridAttention
from fastvideo_vae_core.ops.clip import CausalConv, Run
from fastvideo_vae_gamecraft.config import HunyuanVideoArchConfig
from fastvideo_vae_gamecraft.model import AutoencoderKLHunyuanVideo
from fastvideo_vae_gamecraft.network import Decoder, Downsample, Encoder, ResnetBlock, Upsample

# The published network compresses 8 x 8 pixels. At 4 x 4 as few parameters do well.
ARCH = HunyuanVideoArchConfig(
    block_out_channels=(24, 36, 48),
    down_block_types=("HunyuanVideoDownBlock3D",) * 3,
    up_block_types=("HunyuanVideoUpBlock3D",) * 3,
    layers_per_block=1,
    latent_channels=24,
    norm_num_groups=4,
    spatial_compression_ratio=4,
)
RECIPES = {
    "large": Recipe(arch=ARCH, learning_rate=1.5e-3),
    "polish": Recipe(arch=ARCH, learning_rate=1.5e-3, stages=POLISH_STAGES),
    "small": Recipe(arch=ARCH, learning_rate=1.5e-3, stages=SMALL_STAGES),
}


def main(arguments: Sequence[str] | None = None) -> None:
    demo_video.main(MINIATURE, __doc__, arguments)


def initialised(arch: HunyuanVideoArchConfig) -> AutoencoderKLHunyuanVideo:
    """PyTorch's initialisation, but signals begin on a path that loses none of them, or little.

    Residual blocks and attention begin as the identity, the convolutions between them as orthogonal maps of the
    positions that become one, and of single positions elsewhere. The posterior begins narrow: at variance 1 the first
    latents would be lost in noise.
    """
    model = AutoencoderKLHunyuanVideo(VAEConfig(arch_config=arch))
    here = [(2, 1, 1)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ResnetBlock):
                module.conv2.conv.weight.zero_()
                if not isinstance(module.conv_shortcut, nn.Identity):
                    orthogonal(module.conv_shortcut.conv, [(0, 0, 0)])
            elif isinstance(module, GridAttention):
                for each in module.to_out.parameters():
                    each.zero_()
            elif isinstance(module, Downsample):
                # The last two taps see the pair that becomes one, along all axes; a stride of one has its own position.
                pairs = [
                    (1, 2) if stride == 2 else (at,)
                    for stride, at in zip(module.conv.conv.stride, here[0], strict=True)
                ]
                orthogonal(module.conv.conv, list(itertools.product(*pairs)))
            elif isinstance(module, Upsample):
                orthogonal(module.conv.conv, here)
        for half in (model.encoder, model.decoder):
            assert isinstance(half, Encoder | Decoder)
            orthogonal(half.conv_in.conv, here)
            orthogonal(half.conv_out.conv, here)
        orthogonal(model.post_quant_conv, [(0, 0, 0)])
        orthogonal(model.quant_conv, [(0, 0, 0)])
        assert model.quant_conv.bias is not None
        _, logvar = model.quant_conv.weight.chunk(2)
        _, bias = model.quant_conv.bias.chunk(2)
        logvar.zero_()
        bias.fill_(-8)
    for module in model.modules():
        if type(module) is CausalConv:
            module.__class__ = SideBySide
    return model


class SideBySide(CausalConv):
    """The same convolution, as one of pictures: the frames that it sees lie side by side in their channels.

    For as few channels as here that is several times as fast as a convolution in three dimensions.
    """

    def forward(self, data: Tensor, bias: Tensor | None, fused: bool, run: Run) -> Tensor:
        step, *around = self.conv.stride
        frames = 1 + (data.shape[2] - self.taps) // step
        windows = [data[:, :, tap : tap + 1 + step * (frames - 1) : step] for tap in range(self.taps)]
        pictures = torch.cat(windows, 1).transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        weight = self.conv.weight.transpose(1, 2).flatten(1, 2)
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


def configuration(arch: HunyuanVideoArchConfig) -> dict[str, Any]:
    return arch.to_dict()


MINIATURE = Miniature(
    script="train_demo_gamecraft.py",
    class_name="AutoencoderKLHunyuanVideo",
    model=AutoencoderKLHunyuanVideo,
    arch=HunyuanVideoArchConfig,
    recipes=RECIPES,
    initialised=initialised,
    with_statistics=with_statistics,
    configuration=configuration,
    describe=describe,
)

if __name__ == "__main__":
    main()
