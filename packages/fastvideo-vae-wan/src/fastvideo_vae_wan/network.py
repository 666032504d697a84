"""The causal networks of Wan 2.1 and Wan 2.2.

Shape legend: B batch, C channels, T frames, H, W; N positions of a frame. Every part takes a piece of a video and the
cache of the call; feature maps have their channels innermost in memory, see `fastvideo_vae_core.ops.causal`.
Source: Wan-Video/Wan2.1 `wan/modules/vae.py`; Wan-Video/Wan2.2 `wan/modules/vae2_2.py`. Names are diffusers'.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.errors import ConfigError
from fastvideo_vae_core.ops.attention import attention
from fastvideo_vae_core.ops.causal import Cache, CausalConv3d, norm_silu_conv, rows_of, stack, unstack
from fastvideo_vae_core.ops.modules import Modules
from fastvideo_vae_core.ops.nearest import Nearest
from fastvideo_vae_core.ops.rms_norm import RMSNorm
from fastvideo_vae_core.ops.upsampling import upsampled2d
from fastvideo_vae_wan.config import WanArchConfig


class Encoder(nn.Module):
    """(B, C, T, H, W) in patches -> (B, 2z, t, h, w): mean and log variance before the quant convolution."""

    def __init__(self, arch: WanArchConfig) -> None:
        super().__init__()
        widths, blocks = arch.encoder_widths, arch.num_res_blocks
        self.conv_in = CausalConv3d(arch.in_channels, arch.base_dim)
        levels = [
            (before, after, blocks, sampler)
            for before, after, sampler in zip(
                (arch.base_dim, *widths), widths, (*map(_down_sampler, arch.temperal_downsample), None), strict=False
            )
        ]
        self.down_blocks = Modules[DownLevel | ResidualBlock | Downsample](
            [DownLevel(*level) for level in levels]
            if arch.is_residual
            else itertools.chain.from_iterable(_down_parts(*level) for level in levels)
        )
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = RMSNorm(widths[-1], axes=3)
        self.conv_out = CausalConv3d(widths[-1], 2 * arch.z_dim)
        # How far a latent sees through `down`, in patches.
        self.halo = 2 * blocks
        for _ in widths[1:]:
            self.halo = 2 * self.halo + 1 + 2 * blocks
        self.halo += 1

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return self.middle(self.down(x, cache), cache)

    def down(self, x: Tensor, cache: Cache) -> Tensor:
        """The part that is local in space."""
        x = self.conv_in(x, cache)
        for block in self.down_blocks:
            x = block(x, cache)
        return x

    def middle(self, x: Tensor, cache: Cache) -> Tensor:
        """The part that sees whole frames."""
        x = self.mid_block(x, cache)
        return norm_silu_conv(x, self.norm_out, self.conv_out, cache).settled()


class Decoder(nn.Module):
    """(B, z, t, h, w) -> (B, C, T, H, W) in patches, from latents behind the post-quant convolution."""

    def __init__(self, arch: WanArchConfig) -> None:
        super().__init__()
        widths, blocks = arch.decoder_widths, arch.num_res_blocks + 1
        self.conv_in = CausalConv3d(arch.z_dim, widths[0])
        self.mid_block = MidBlock(widths[0])
        level = ResidualUpLevel if arch.is_residual else UpLevel
        samplers = (*(Upsample3d if temporal else Upsample2d for temporal in reversed(arch.temperal_downsample)), None)
        self.up_blocks = Modules[UpLevel | ResidualUpLevel](
            level(before, after, blocks, sampler)
            for before, after, sampler in zip(level.inputs(widths), widths, samplers, strict=True)
        )
        self.norm_out = RMSNorm(widths[-1], axes=3)
        self.conv_out = CausalConv3d(widths[-1], arch.out_channels)
        # How many latents away a patch sees through `up`.
        self.halo = 1 + 2 * blocks
        for _ in widths[1:]:
            self.halo = (self.halo + 2) // 2 + 2 * blocks

    def forward(self, z: Tensor, cache: Cache) -> Tensor:
        return self.up(self.middle(z, cache), cache)

    def middle(self, z: Tensor, cache: Cache) -> Tensor:
        """The part that sees whole frames."""
        return self.mid_block(self.conv_in(z, cache), cache)

    def up(self, x: Tensor, cache: Cache) -> Tensor:
        """The part that is local in space."""
        for level in self.up_blocks:
            x = level(x, cache)
        return self.end(x, cache)

    def end(self, x: Tensor, cache: Cache) -> Tensor:
        """Norm, SiLU, convolution."""
        return norm_silu_conv(x, self.norm_out, self.conv_out, cache).settled()


class DownLevel(nn.Module):
    """Wan 2.2: residual blocks and the change of resolution, bypassed by the average over what becomes one position."""

    def __init__(self, before: int, after: int, blocks: int, sampler: type[Downsample] | None) -> None:
        super().__init__()
        self.resnets = Modules[ResidualBlock](_resnets(before, after, blocks))
        self.downsampler = sampler(after) if sampler else Keep()
        self.shortcut = Average(before, after, 2 if sampler is Downsample3d else 1, 2 if sampler else 1)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        h = x
        for resnet in self.resnets:
            h = resnet(h, cache)
        return self.downsampler(h, cache) + self.shortcut(x, cache)


class UpLevel(nn.Module):
    """Wan 2.1: residual blocks and the change of resolution, which also halves the channels."""

    def __init__(self, before: int, after: int, blocks: int, sampler: type[Upsample2d] | None) -> None:
        super().__init__()
        self.resnets = Modules[ResidualBlock](_resnets(before, after, blocks))
        self.upsamplers = Modules[Upsample2d]([sampler(after, after // 2)] if sampler else [])

    @staticmethod
    def inputs(widths: Sequence[int]) -> list[int]:
        """Channels that each level takes."""
        return [widths[0], *(width // 2 for width in widths[:-1])]

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        for part in (*self.resnets, *self.upsamplers):
            x = part(x, cache)
        return x


class ResidualUpLevel(nn.Module):
    """Wan 2.2: residual blocks and the change of resolution, bypassed by repetition."""

    def __init__(self, before: int, after: int, blocks: int, sampler: type[Upsample2d] | None) -> None:
        super().__init__()
        self.resnets = Modules[ResidualBlock](_resnets(before, after, blocks))
        self.upsampler = sampler(after, after) if sampler else Keep()
        self.shortcut = Repeat(before, after, 2 if sampler is Upsample3d else 1, 2) if sampler else Nothing()

    @staticmethod
    def inputs(widths: Sequence[int]) -> list[int]:
        """Channels that each level takes."""
        return [widths[0], *widths[:-1]]

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        h = x
        for resnet in self.resnets:
            h = resnet(h, cache)
        return self.shortcut.add(self.upsampler(h, cache), x, cache)


class MidBlock(nn.Module):
    """Residual block, attention within each frame, residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resnets = Modules[ResidualBlock](ResidualBlock(width, width) for _ in range(2))
        self.attentions = Modules[Attention]([Attention(width)])

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, cache), cache)
        return self.resnets[1](x, cache)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; added to the input, through a linear map where the width changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(before, axes=3)
        self.conv1 = CausalConv3d(before, after)
        self.norm2 = RMSNorm(after, axes=3)
        self.conv2 = CausalConv3d(after, after)
        self.conv_shortcut = nn.Identity() if before == after else Pointwise(before, after)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        # Nested, so that nothing holds the first result during the second convolution.
        h = norm_silu_conv(norm_silu_conv(x, self.norm1, self.conv1, cache), self.norm2, self.conv2, cache)
        return h.plus(self.conv_shortcut(x))


class Attention(nn.Module):
    """Residual self-attention of one head over the positions of each frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, axes=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        # Everything is asked about, by those positions that are here.
        rows, everything = rows_of(x), rows_of(cache.gathered(x))
        qkv = F.linear(self.norm(everything), self.to_qkv.weight.flatten(1), self.to_qkv.bias).movedim(-1, 1)
        q, k, v = qkv.chunk(3, dim=1)
        q, k, v = (rows_of(each).flatten(2, 3) for each in (cache.own(q), k, v))
        mixed = attention(q, k, v)
        mixed = F.linear(mixed, self.proj.weight.flatten(1), self.proj.bias)
        return (mixed.view_as(rows) + rows).movedim(-1, 1)


class Downsample(nn.Module):
    """Half the resolution: zeros below and at the right, then a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        frames = rows_of(cache.widened(x, 0, 2))
        return cache.narrowed(unstack(self.resample(stack(frames)), frames), 0, 1)


class Downsample3d(Downsample):
    """The same, and half the frames behind the first, which stays one."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.time_conv = CausalConv3d(width, width, (3, 1, 1), stride=2)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        x = super().forward(x, cache)
        if not cache.first:
            return self.time_conv(x, cache)
        if not cache.last:
            cache.keep(self.time_conv, rows_of(x))
        return x


class Upsample2d(nn.Module):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(Nearest(), nn.Conv2d(before, after, 3, padding=1))

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        frames = rows_of(cache.widened(x, 1, 1))
        nearest, conv = self.resample
        assert isinstance(nearest, Nearest)
        assert isinstance(conv, nn.Conv2d)
        return cache.narrowed(unstack(upsampled2d(stack(frames), conv, nearest), frames), 2, 2)


class Upsample3d(Upsample2d):
    """The same, and twice the frames behind the first, which stays one and is not seen by the others."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.time_conv = CausalConv3d(before, 2 * before, (3, 1, 1))

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        if not cache.first:
            pairs_BTHW2C = rows_of(self.time_conv(x, cache)).unflatten(-1, (2, -1))
            x = pairs_BTHW2C.movedim(4, 2).flatten(1, 2).movedim(-1, 1)
        return super().forward(x, cache)


class Average(nn.Module):
    """Fewer positions: the channels of those that become one lie side by side, and neighbours among them are averaged.

    A missing frame before the first counts as zero.
    """

    def __init__(self, before: int, after: int, time: int, space: int) -> None:
        super().__init__()
        self.after, self.time, self.space = after, time, space

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        frames = rows_of(x)
        if cache.first:
            frames = F.pad(frames, [0, 0] * 3 + [self.time - 1, 0])
        cells = frames.unflatten(3, (-1, self.space)).unflatten(2, (-1, self.space)).unflatten(1, (-1, self.time))
        # From B, T, time, H, space, W, space, C.
        cells = cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)
        return cells.unflatten(-1, (self.after, -1)).mean(-1).movedim(-1, 1)


class Repeat(nn.Module):
    """More positions: channels are repeated, and then taken apart into the positions that one becomes.

    Channel c of position i, of the n that one becomes, is channel (c * n + i) // repeats. Of the first frame only the
    last positions in time exist.
    """

    def __init__(self, before: int, after: int, time: int, space: int) -> None:
        super().__init__()
        self.time, self.space = time, space
        positions = time * space * space
        step, odd = divmod(before, after)
        if odd or positions % step:
            raise ConfigError(f"{before} channels cannot be repeated to {after} at {positions} positions for each")
        repeats = positions // step
        self.channels = [slice(position // repeats, None, step) for position in range(positions)]

    def add(self, h: Tensor, x: Tensor, cache: Cache) -> Tensor:
        """h + the repetition of x, in the place of h."""
        target, source = rows_of(h), rows_of(x)
        times = range(self.time - 1 if cache.first else 0, self.time)
        for t, i, j in itertools.product(times, range(self.space), range(self.space)):
            into = target[:, t - times[0] :: len(times), i :: self.space, j :: self.space]
            into += source[..., self.channels[(t * self.space + i) * self.space + j]]
        return h


class Nothing(nn.Module):
    """No bypass."""

    def add(self, h: Tensor, x: Tensor, cache: Cache) -> Tensor:
        return h


class Keep(nn.Module):
    """No change of resolution."""

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return x


class Pointwise(nn.Conv3d):
    """A linear map of the channels of each position."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(rows_of(x), self.weight.flatten(1), self.bias).movedim(-1, 1)


def _resnets(before: int, after: int, blocks: int) -> Iterator[ResidualBlock]:
    return (ResidualBlock(after if each else before, after) for each in range(blocks))


def _down_parts(
    before: int, after: int, blocks: int, sampler: type[Downsample] | None
) -> Iterator[ResidualBlock | Downsample]:
    yield from _resnets(before, after, blocks)
    if sampler:
        yield sampler(after)


def _down_sampler(temporal: bool) -> type[Downsample]:
    return Downsample3d if temporal else Downsample
