"""The convolutional networks of LTX-2's video autoencoder.

Shape legend: B batch, C channels, T frames, H, W. Every part takes a piece of a video and the cache of the call;
feature maps have their channels innermost in memory, see `fastvideo_vae_core.ops.causal`. The encoder is causal. The
decoder usually is not: each of its convolutions sees one later frame, so what it makes comes late, and the piece that
is the last brings the rest.
Source: Lightricks/LTX-2 `ltx_core/model/video_vae`. Names are diffusers'.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.ops.causal import Cache, CausalConv3d, norm_silu_conv, rows_of
from fastvideo_vae_core.ops.modules import Modules
from fastvideo_vae_core.ops.patches import patchify, unpatchify
from fastvideo_vae_core.ops.rms_norm import Modulation, PixelNorm
from fastvideo_vae_ltx2.config import LTX2VideoArchConfig

EPS = 1e-8
_FREQUENCIES = 128

# Positions that one becomes, along time, height and width.
Stride = tuple[int, int, int]
STRIDES: dict[str, Stride] = {"spatial": (1, 2, 2), "temporal": (2, 1, 1), "spatiotemporal": (2, 2, 2)}


class Sight(NamedTuple):
    """What the convolutions of a half see beyond a video: around its pictures, and how many later frames."""

    border: Literal["zeros", "reflect"]
    ahead: int


class Encoder(nn.Module):
    """(B, 3, T, H, W) -> (B, z + 1, t, h, w): the mean and one log variance."""

    def __init__(self, arch: LTX2VideoArchConfig) -> None:
        super().__init__()
        self.patch = arch.patch_size
        sight = Sight(arch.encoder_spatial_padding_mode, 0)
        widths = (arch.latent_channels, *arch.block_out_channels)
        self.conv_in = Conv(arch.in_channels * self.patch**2, widths[0], sight)
        self.down_blocks = Modules[DownLevel](
            DownLevel(before, after, blocks, STRIDES[kind], sight)
            for before, after, blocks, kind in zip(
                widths, widths[1:], arch.layers_per_block, arch.downsample_type, strict=False
            )
        )
        self.mid_block = Level(widths[-1], arch.layers_per_block[-1], sight)
        self.norm_out = PixelNorm(EPS)
        self.conv_out = Conv(widths[-1], arch.latent_channels + 1, sight)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        x = self.begin(x, cache)
        for level in self.down_blocks:
            x = level(x, cache)
        return self.end(x, cache)

    def begin(self, x: Tensor, cache: Cache) -> Tensor:
        """What comes before the levels."""
        return self.conv_in(patchify(x, self.patch), cache)

    def end(self, x: Tensor, cache: Cache) -> Tensor:
        """What comes behind them."""
        return norm_silu_conv(self.mid_block(x, cache), self.norm_out, self.conv_out.conv, cache).settled()


class Decoder(nn.Module):
    """(B, z, t, h, w) -> (B, 3, T, H, W), from latents that are not normalised.

    What it makes comes late, and most of it at the end, so it is run level by level: `begin`, the levels, `end`.
    """

    def __init__(self, arch: LTX2VideoArchConfig) -> None:
        super().__init__()
        self.patch, timed = arch.patch_size, arch.timestep_conditioning
        sight = Sight(arch.decoder_spatial_padding_mode, 0 if arch.decoder_causal else 1)
        widths, blocks = arch.decoder_widths, arch.decoder_layers_per_block[::-1]
        self.conv_in = Conv(arch.latent_channels, widths[0], sight)
        self.mid_block = Level(widths[0], blocks[0], sight, timed)
        self.up_blocks = Modules[UpLevel](
            UpLevel(before, after, depth, STRIDES[kind], sight, timed, residual)
            for before, after, depth, kind, residual in zip(
                widths, widths[1:], blocks[1:], arch.upsample_type, arch.upsample_residual[::-1], strict=False
            )
        )
        self.norm_out = PixelNorm(EPS)
        self.conv_out = Conv(widths[-1], arch.out_channels * self.patch**2, sight)
        if timed:
            self.timestep_scale_multiplier = nn.Parameter(torch.tensor(1000.0))
            self.scale_shift_table = nn.Parameter(torch.zeros(2, widths[-1]))
        self.time_embedder = TimeEmbedding(2 * widths[-1]) if timed else Timeless()

    def time(self, timestep: Tensor | None) -> Tensor | None:
        """The timestep of each item (B) as the embedders take it; None where the decoder has none."""
        return None if timestep is None else timestep * self.timestep_scale_multiplier.to(timestep)

    def begin(self, z: Tensor, cache: Cache, time: Tensor | None) -> Tensor:
        """What comes before the levels."""
        return self.mid_block(self.conv_in(z, cache), cache, time)

    def end(self, x: Tensor, cache: Cache, time: Tensor | None) -> Tensor:
        """What comes behind them."""
        embedding = self.time_embedder(time, x.dtype)
        modulation = None
        if embedding is not None:
            shift, scale = (self.scale_shift_table.to(x.dtype) + embedding.unflatten(1, (2, -1))).unbind(1)
            modulation = Modulation(scale, shift)
        y = norm_silu_conv(x, self.norm_out, self.conv_out.conv, cache, modulation).settled()
        return unpatchify(y, self.patch)


class Level(nn.Module):
    """Residual blocks of one resolution."""

    def __init__(self, width: int, blocks: int, sight: Sight, timed: bool = False) -> None:
        super().__init__()
        block = TimedBlock if timed else ResidualBlock
        self.resnets = Modules[ResidualBlock](block(width, sight) for _ in range(blocks))
        self.time_embedder = TimeEmbedding(4 * width) if timed else Timeless()

    def forward(self, x: Tensor, cache: Cache, time: Tensor | None = None) -> Tensor:
        embedding = self.time_embedder(time, x.dtype)
        for resnet in self.resnets:
            x = resnet(x, cache, embedding)
        return x


class DownLevel(Level):
    """Residual blocks, then the change of resolution."""

    def __init__(self, before: int, after: int, blocks: int, stride: Stride, sight: Sight) -> None:
        super().__init__(before, blocks, sight)
        self.downsamplers = Modules[Downsample]([Downsample(before, after, stride, sight)])

    def forward(self, x: Tensor, cache: Cache, time: Tensor | None = None) -> Tensor:
        return self.downsamplers[0](super().forward(x, cache), cache)


class UpLevel(Level):
    """The change of resolution, then residual blocks."""

    def __init__(
        self, before: int, after: int, blocks: int, stride: Stride, sight: Sight, timed: bool, residual: bool
    ) -> None:
        super().__init__(after, blocks, sight, timed)
        upsample = ResidualUpsample if residual else Upsample
        self.upsamplers = Modules[Upsample]([upsample(before, after, stride, sight)])

    def forward(self, x: Tensor, cache: Cache, time: Tensor | None = None) -> Tensor:
        return super().forward(self.upsamplers[0](x, cache), cache, time)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; added to the input."""

    def __init__(self, width: int, sight: Sight) -> None:
        super().__init__()
        self.norm1 = PixelNorm(EPS)
        self.conv1 = Conv(width, width, sight)
        self.norm2 = PixelNorm(EPS)
        self.conv2 = Conv(width, width, sight)

    def forward(self, x: Tensor, cache: Cache, embedding: Tensor | None = None) -> Tensor:
        first, second = self.modulations(embedding)
        # Nested, so that nothing holds the first result during the second convolution.
        h = norm_silu_conv(
            norm_silu_conv(x, self.norm1, self.conv1.conv, cache, first), self.norm2, self.conv2.conv, cache, second
        )
        return h.plus_late(x, self, cache)

    def modulations(self, embedding: Tensor | None) -> tuple[Modulation | None, Modulation | None]:
        """What follows each norm."""
        return None, None


class TimedBlock(ResidualBlock):
    """A residual block whose norms are followed by what the timestep says."""

    def __init__(self, width: int, sight: Sight) -> None:
        super().__init__(width, sight)
        self.scale_shift_table = nn.Parameter(torch.zeros(4, width))

    def modulations(self, embedding: Tensor | None) -> tuple[Modulation | None, Modulation | None]:
        assert embedding is not None
        table = self.scale_shift_table.to(embedding.dtype) + embedding.unflatten(1, (4, -1))
        shift1, scale1, shift2, scale2 = table.unbind(1)
        return Modulation(scale1, shift1), Modulation(scale2, shift2)


class Conv(nn.Module):
    """A convolution of 3 x 3 x 3, with copies of the first frame before it and of the last behind it."""

    def __init__(self, before: int, after: int, sight: Sight, positions: int = 1) -> None:
        super().__init__()
        self.conv = CausalConv3d(
            before, after, edge="copies", ahead=sight.ahead, border=sight.border, positions=positions
        )

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return self.conv(x, cache)


class Downsample(nn.Module):
    """Fewer positions: the channels of those that become one lie side by side, in a convolution of all, and bypassed by
    averages of neighbours among them. A copy of the first frame stands before it where frames are halved."""

    def __init__(self, before: int, after: int, stride: Stride, sight: Sight) -> None:
        super().__init__()
        self.stride, self.after = stride, after
        self.conv = Conv(before, after // math.prod(stride), sight)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        if self.stride[0] == 2 and cache.begins(self):
            x = torch.cat([x[:, :, :1], x], 2)
        averages = self._gather(x).unflatten(-1, (self.after, -1)).mean(-1)
        return (self._gather(self.conv(x, cache)) + averages).movedim(-1, 1)

    def _gather(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, t, h, w, C * positions)."""
        time, height, width = self.stride
        cells = rows_of(x).unflatten(3, (-1, width)).unflatten(2, (-1, height)).unflatten(1, (-1, time))
        # From B, t, time, h, height, w, width, C.
        return cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)


class Upsample(nn.Module):
    """More positions: a convolution, whose channels are taken apart into the positions that one becomes. Where frames
    are doubled the first has lost its first half."""

    def __init__(self, before: int, after: int, stride: Stride, sight: Sight) -> None:
        super().__init__()
        self.stride = stride
        self.conv = Conv(before, after * math.prod(stride), sight, positions=math.prod(stride))

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return self._spread(self.conv(x, cache), None, cache)

    def _spread(self, y: Tensor, bypass: Tensor | None, cache: Cache) -> Tensor:
        """(B, C * positions, t, h, w) -> (B, C, T, H, W); the bypass has fewer channels, which are repeated."""
        cells = self._cells(rows_of(y), self.conv.conv.by_position)
        batch, t, _, h, _, w, _, channels = cells.shape
        time, height, width = self.stride
        made = y.new_empty(batch, t * time, h * height, w * width, channels)
        # Sizes are spelt out, because a piece may have no frames.
        places = made.view(cells.shape)
        places.copy_(cells)
        if bypass is not None:
            few = self._cells(rows_of(bypass), False)
            repeats = channels // few.shape[-1]
            places.unflatten(-1, (repeats, few.shape[-1])).add_(few.unsqueeze(-2))
        if time == 2 and t and cache.begins(self):
            made = made[:, 1:]
        return made.movedim(-1, 1)

    def _cells(self, rows: Tensor, by_position: bool) -> Tensor:
        """(B, t, h, w, C * positions) as a view (B, t, time, h, height, w, width, C)."""
        channels = rows.shape[-1] // math.prod(self.stride)
        if by_position:
            return rows.unflatten(-1, (*self.stride, channels)).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return rows.unflatten(-1, (channels, *self.stride)).permute(0, 1, 5, 2, 6, 3, 7, 4)


class ResidualUpsample(Upsample):
    """The same, bypassed by the input, which is taken apart and repeated along the channels."""

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        y = self.conv(x, cache)
        return self._spread(y, self._reached(x, y.shape[2], cache), cache)

    def _reached(self, x: Tensor, frames: int, cache: Cache) -> Tensor:
        """The frames of the input that the convolution has come to; the others wait in the cache."""
        waiting = cache.take(self)
        if waiting is not None:
            x = torch.cat([waiting.movedim(-1, 1), x], 2)
        if not cache.last and frames < x.shape[2]:
            cache.keep(self, rows_of(x)[:, frames:])
        return x[:, :, :frames]


class TimeEmbedding(nn.Module):
    """Timesteps (B) -> (B, width): sinusoids and two linear maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = nn.ModuleDict(
            {"linear_1": nn.Linear(2 * _FREQUENCIES, width), "linear_2": nn.Linear(width, width)}
        )

    def forward(self, time: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        assert time is not None
        exponents = torch.arange(_FREQUENCIES, dtype=torch.float32, device=time.device) / _FREQUENCIES
        angles = time[:, None].float() * torch.exp(-math.log(10_000) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(dtype)
        first, second = self.timestep_embedder["linear_1"], self.timestep_embedder["linear_2"]
        return second(F.silu(first(waves)))


class Timeless(nn.Module):
    """Of a decoder that knows no timestep."""

    def forward(self, time: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None
