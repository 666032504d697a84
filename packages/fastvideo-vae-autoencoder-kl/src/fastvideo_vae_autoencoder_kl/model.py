"""The KL image autoencoder of latent diffusion.

Shape legend: B batch, C channels; H, W pixels, h, w latents.
Source: CompVis/latent-diffusion `ldm/models/autoencoder.py` and `ldm/modules/diffusionmodules/model.py`;
black-forest-labs/flux `src/flux/modules/autoencoder.py`. Parameters have diffusers' names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_autoencoder_kl.config import AutoencoderKLArchConfig
from fastvideo_vae_core.blending import Blend, BlendedTiles, blended_tiles
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.distribution import DiagonalGaussianDistribution
from fastvideo_vae_core.latents import scale_latents, unscale_latents
from fastvideo_vae_core.ops import taps
from fastvideo_vae_core.ops.attention import GridAttention
from fastvideo_vae_core.ops.conv2d import Conv2d
from fastvideo_vae_core.ops.modules import Modules
from fastvideo_vae_core.ops.nearest import Nearest
from fastvideo_vae_core.ops.norm import Moments, defers, formulation, fuses, group_norm_act, plus
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.ops.upsampling import upsampled2d
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.tiling import POINTWISE, WHOLE, Axis, Step
from fastvideo_vae_core.vae import ParallelTiledVAE

Act = Callable[[Tensor], Tensor]
# Whether rows, and columns, of a crop go on beyond what is wanted; see `Step.trims`.
Inner = tuple[bool, ...]
_BORDERED = (False, False)


class AutoencoderKL(ParallelTiledVAE[DiagonalGaussianDistribution]):
    """Images in [-1, 1] to a diagonal Gaussian over latents, and back.

    (B, 3, H, W) -> (B, z, H / 8, W / 8) with z = 4 (SD 1.x, SDXL) or 16 (SD3, FLUX.1); H and W multiples of 8.
    For example (1, 3, 1024, 1024) -> (1, 16, 128, 128). The decoder does not clamp.

    Raises:
        ShapeError: H or W is no multiple of the compression ratio, or the channels do not fit.
    """

    family = "autoencoder_kl"
    encoder_modules = ("encoder", "quant_conv")
    decoder_modules = ("decoder", "post_quant_conv")
    sample_layout = "(B, C, H, W)"

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        arch = self.arch = _arch(config)
        z = arch.latent_channels
        if config.load_encoder:
            self.encoder = Encoder(arch)
            self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if arch.use_quant_conv else nn.Identity()
        if config.load_decoder:
            self.decoder = Decoder(arch)
            self.post_quant_conv = nn.Conv2d(z, z, 1) if arch.use_post_quant_conv else nn.Identity()

    @property
    def sample_axes(self) -> tuple[Axis, ...]:
        return (Axis(up=self.arch.spatial_compression_ratio),) * 2

    @property
    def channels(self) -> tuple[int, int]:
        return self.arch.in_channels, self.arch.latent_channels

    def posterior(self, parameters: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(parameters)

    def normalize_latents(self, z: Tensor) -> Tensor:
        """(z - shift) * scaling, or (z - mean) * scaling / std where the checkpoint has means."""
        return scale_latents(z, *self._normalization())

    def denormalize_latents(self, z: Tensor) -> Tensor:
        """z / scaling + shift, or z * std / scaling + mean where the checkpoint has means."""
        return unscale_latents(z, *self._normalization())

    def encode_steps(self) -> list[Step]:
        tail = Step(name="quant_conv", run=lambda grids, _: self.quant_conv(grids[0]), axes=(POINTWISE,) * 2)
        return [*self.encoder.steps(), tail]

    def decode_steps(self) -> list[Step]:
        head = Step(name="post_quant_conv", run=lambda grids, _: self.post_quant_conv(grids[0]), axes=(POINTWISE,) * 2)
        return [head, *self.decoder.steps()]

    def _encode(self, x_BCHW: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x_BCHW))

    def _decode(self, z_BChw: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z_BChw))

    def _blended_tiles(self, direction: Direction, shape: Sequence[int], blend: Blend) -> BlendedTiles:
        ratio = self.arch.spatial_compression_ratio
        blend.check(None, ratio)
        return blended_tiles(shape, None, blend.cut("pixels", direction, ratio))

    def _formulation(self, direction: Direction, dtype: torch.dtype) -> tuple[str, ...]:
        return formulation(self.device, dtype)

    def _normalization(self) -> tuple[float, float | None, Tensor | None, Tensor | None]:
        arch = self.arch
        mean = None if arch.latents_mean is None else torch.tensor(arch.latents_mean)
        std = None if arch.latents_std is None else torch.tensor(arch.latents_std)
        return arch.scaling_factor, arch.shift_factor, mean, std


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 2z, h, w): mean and log variance before the quant convolution."""

    def __init__(self, arch: AutoencoderKLArchConfig) -> None:
        super().__init__()
        widths, act = arch.block_out_channels, ACTIVATIONS[arch.act_fn]
        self.conv_in = nn.Conv2d(arch.in_channels, widths[0], 3, padding=1)
        self.down_blocks = Modules[Level](
            Level(
                (before, *[width] * arch.layers_per_block),
                arch.norm_num_groups,
                act,
                attention=kind.startswith("Attn"),
                downsample=level < len(widths) - 1,
            )
            for level, (before, width, kind) in enumerate(
                zip((widths[0], *widths[:-1]), widths, arch.down_block_types, strict=True)
            )
        )
        self.mid_block = MidBlock(widths[-1], arch, act)
        self.conv_norm_out = nn.GroupNorm(arch.norm_num_groups, widths[-1], eps=1e-6)
        # SiLU whatever `act_fn` says, as diffusers has it.
        self.conv_act: Act = F.silu
        self.conv_out = nn.Conv2d(widths[-1], 2 * arch.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(group_norm_act(x, self.conv_norm_out, self.conv_act))

    def steps(self) -> Iterator[Step]:
        yield _conv_step("conv_in", self.conv_in)
        for index, level in enumerate(self.down_blocks):
            yield from level.steps(f"down_blocks.{index}")
        yield from self.mid_block.steps("mid_block")
        yield _norm_conv_step("conv_out", self.conv_norm_out, self.conv_act, self.conv_out)


class Decoder(nn.Module):
    """(B, z, h, w) -> (B, 3, H, W), from latents behind the post-quant convolution."""

    def __init__(self, arch: AutoencoderKLArchConfig) -> None:
        super().__init__()
        widths, act = arch.block_out_channels[::-1], ACTIVATIONS[arch.act_fn]
        self.conv_in = nn.Conv2d(arch.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], arch, act)
        self.up_blocks = Modules[Level](
            Level(
                (before, *[width] * (arch.layers_per_block + 1)),
                arch.norm_num_groups,
                act,
                attention=kind.startswith("Attn"),
                upsample=level < len(widths) - 1,
            )
            for level, (before, width, kind) in enumerate(
                zip((widths[0], *widths[:-1]), widths, arch.up_block_types, strict=True)
            )
        )
        self.conv_norm_out = nn.GroupNorm(arch.norm_num_groups, widths[-1], eps=1e-6)
        self.conv_act: Act = F.silu
        self.conv_out = nn.Conv2d(widths[-1], arch.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(group_norm_act(x, self.conv_norm_out, self.conv_act))

    def steps(self) -> Iterator[Step]:
        yield _conv_step("conv_in", self.conv_in)
        yield from self.mid_block.steps("mid_block")
        for index, level in enumerate(self.up_blocks):
            yield from level.steps(f"up_blocks.{index}")
        yield _norm_conv_step("conv_out", self.conv_norm_out, self.conv_act, self.conv_out)


class Level(nn.Module):
    """Residual blocks at one resolution, with attention behind each if there is any, then the change of resolution."""

    def __init__(
        self,
        widths: Sequence[int],
        groups: int,
        act: Act,
        *,
        attention: bool,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.resnets = Modules[ResnetBlock](
            ResnetBlock(before, after, groups, act) for before, after in itertools.pairwise(widths)
        )
        self.attentions = Modules[GridAttention | nn.Identity](
            GridAttention(after, groups) if attention else nn.Identity() for after in widths[1:]
        )
        self.downsamplers = Modules[Downsample]([Downsample(widths[-1])] if downsample else [])
        self.upsamplers = Modules[Upsample]([Upsample(widths[-1])] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x))
        for sampler in (*self.downsamplers, *self.upsamplers):
            x = sampler(x)
        return x

    def steps(self, name: str) -> Iterator[Step]:
        for index, (resnet, attention) in enumerate(zip(self.resnets, self.attentions, strict=True)):
            yield from resnet.steps(f"{name}.resnets.{index}")
            if isinstance(attention, GridAttention):
                yield _attention_step(f"{name}.attentions.{index}", attention)
        for sampler in (*self.downsamplers, *self.upsamplers):
            yield sampler.step(name)


class MidBlock(nn.Module):
    """Residual block, attention over the whole grid, residual block."""

    def __init__(self, width: int, arch: AutoencoderKLArchConfig, act: Act) -> None:
        super().__init__()
        groups = arch.norm_num_groups
        self.resnets = Modules[ResnetBlock](ResnetBlock(width, width, groups, act) for _ in range(2))
        self.attentions = Modules[GridAttention | nn.Identity](
            [GridAttention(width, groups)] if arch.mid_block_add_attention else [nn.Identity()]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))

    def steps(self, name: str) -> Iterator[Step]:
        yield from self.resnets[0].steps(f"{name}.resnets.0")
        if isinstance(self.attentions[0], GridAttention):
            yield _attention_step(f"{name}.attentions.0", self.attentions[0])
        yield from self.resnets[1].steps(f"{name}.resnets.1")


class ResnetBlock(nn.Module):
    """Norm, activation, convolution, twice; added to the input, through a 1x1 convolution where the width changes."""

    def __init__(self, before: int, after: int, groups: int, act: Act) -> None:
        super().__init__()
        self.act = act
        self.norm1 = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv1 = Conv2d(before, after, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, after, eps=1e-6)
        self.conv2 = Conv2d(after, after, 3, padding=1)
        self.conv_shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not fuses(x, self.norm1, self.act):
            return self._second(self._first(x, None), x, None)
        # The same, with biases left to who reads next: each would be a pass over memory.
        h = _unbiased(group_norm_act(x, self.norm1, self.act), self.conv1)
        h = _unbiased(group_norm_act(h, self.norm2, self.act, bias=self.conv1.bias), self.conv2)
        shortcut, bias = self._unbiased_shortcut(x)
        return plus(h, bias, shortcut)

    def steps(self, name: str) -> Iterator[Step]:
        yield Step(
            name=f"{name}.conv1",
            run=lambda grids, moments, inner=_BORDERED: self._first_step(grids[0], moments, inner),
            axes=_CONV,
            writes="residual",
            norm=self.norm1,
            pending=self._pending(),
            trims=True,
        )
        yield Step(
            name=f"{name}.conv2",
            run=lambda grids, moments, inner=_BORDERED: self._second_step(grids[0], grids[1], moments, inner),
            axes=_CONV,
            reads=("residual", "x"),
            norm=self.norm2,
            trims=True,
        )

    def _first(self, x: Tensor, moments: Moments | None) -> Tensor:
        return self.conv1(group_norm_act(x, self.norm1, self.act, moments))

    def _second(self, residual: Tensor, x: Tensor, moments: Moments | None) -> Tensor:
        # The convolution's result is new, so the sum needs no further buffer.
        return self.conv2(group_norm_act(residual, self.norm2, self.act, moments)).add_(self.conv_shortcut(x))

    def _pending(self) -> Tensor | None:
        """The bias between the two steps, if the second one adds it."""
        return self.conv1.bias if defers(self.conv1.weight, self.act) else None

    def _first_step(self, x: Tensor, moments: Moments | None, inner: Inner) -> Tensor:
        if self._pending() is None:
            return self._first(x, moments)
        return _unbiased(group_norm_act(x, self.norm1, self.act, moments), self.conv1, inner)

    def _second_step(self, residual: Tensor, x: Tensor, moments: Moments | None, inner: Inner) -> Tensor | Sum:
        if self._pending() is None:
            return self._second(residual, x, moments)
        made = _unbiased(group_norm_act(residual, self.norm2, self.act, moments, self.conv1.bias), self.conv2, inner)
        shortcut, bias = self._unbiased_shortcut(x)
        rows, columns = (slice(1, -1) if each else slice(None) for each in inner)
        return Sum(made, shortcut[:, :, rows, columns], bias)

    def _unbiased_shortcut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What goes past the convolutions, and all biases of the sum."""
        assert self.conv2.bias is not None
        if not isinstance(self.conv_shortcut, nn.Conv2d):
            return x, self.conv2.bias
        assert self.conv_shortcut.bias is not None
        return _unbiased(x, self.conv_shortcut), self.conv2.bias.float() + self.conv_shortcut.bias


class Downsample(nn.Module):
    """Half the resolution: zeros below and at the right, then a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))

    def step(self, name: str) -> Step:
        return Step(name=f"{name}.downsample", run=lambda grids, _: self(grids[0]), axes=(Axis(down=2, after=1),) * 2)


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.nearest = Nearest()
        self.conv = Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, inner: Inner = _BORDERED) -> Tensor:
        return upsampled2d(x, self.conv, self.nearest, inner)

    def step(self, name: str) -> Step:
        return Step(
            name=f"{name}.upsample",
            run=lambda grids, _, inner=_BORDERED: self(grids[0], inner),
            axes=(Axis(up=2, before=1, after=1),) * 2,
            trims=True,
        )


ACTIVATIONS: dict[str, Act] = {"silu": F.silu, "swish": F.silu, "mish": F.mish, "gelu": F.gelu, "relu": F.relu}

_CONV = (Axis(before=1, after=1),) * 2


def _arch(config: VAEConfig) -> AutoencoderKLArchConfig:
    assert isinstance(config.arch_config, AutoencoderKLArchConfig)
    return config.arch_config


def _unbiased(x: Tensor, conv: nn.Conv2d, inner: Inner = _BORDERED) -> Tensor:
    """The convolution without its bias, and without padding rows, or columns, where the crop goes on."""
    assert not isinstance(conv.padding, str)
    padding = [0 if each else size for size, each in zip(conv.padding, inner, strict=True)]
    return taps.conv2d(x, conv, None, padding)


def _conv_step(name: str, conv: nn.Conv2d) -> Step:
    return Step(name=name, run=lambda grids, _: conv(grids[0]), axes=_CONV)


def _norm_conv_step(name: str, norm: nn.GroupNorm, act: Act, conv: nn.Conv2d) -> Step:
    return Step(
        name=name,
        run=lambda grids, moments: conv(group_norm_act(grids[0], norm, act, moments)),
        axes=_CONV,
        norm=norm,
    )


def _attention_step(name: str, attention: GridAttention) -> Step:
    return Step(
        name=name,
        run=lambda grids, _: attention(grids[0]),
        axes=(WHOLE,) * 2,
        excerpt=lambda grids, region: attention.excerpt(grids[0], region),
    )
