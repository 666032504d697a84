"""The audio autoencoder of LTX-2, which compresses log-mel spectrograms.

Shape legend: B batch, C channels; T frames, M mel bins; t, m latents. All convolutions are causal in time.
Source: Lightricks/LTX-2 `ltx_core/model/audio_vae/audio_vae.py`. Names are the official ones, which diffusers has too.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.distribution import DiagonalGaussianDistribution
from fastvideo_vae_core.errors import ConfigError, ShapeError
from fastvideo_vae_core.ops.modules import Modules
from fastvideo_vae_core.ops.nearest import Nearest
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.rehearsal import device_of
from fastvideo_vae_core.tiling import Axis, Step, slide
from fastvideo_vae_core.vae import ParallelTiledVAE
from fastvideo_vae_ltx2.config import LTX2AudioArchConfig
from fastvideo_vae_ltx2.mel import log_mel

EPS = 1e-6
# Latents of a piece of a stream: 20 s, of which 7 % are computed twice.
_PIECE = 512


class AutoencoderKLLTX2Audio(ParallelTiledVAE[DiagonalGaussianDistribution]):
    """Log-mel spectrograms to a diagonal Gaussian over latents, and back.

    (B, 2, T, 64) -> (B, 8, 1 + (T - 1) / 4, 16); T = 4k + 1. For example (1, 2, 501, 64), 5 s, -> (1, 8, 126, 16).
    `waveform_to_mel` makes the spectrograms of waveforms; `LTX2Vocoder` makes waveforms of decoded ones.

    The official encoder takes any T and leaves the last frames out of account that are more than 4k + 1; so does
    `VAEConfig(illegal_sizes="official")`, and `pad_to_valid` repeats the last frame instead.

    Latents are not normalised here, as in diffusers; the official networks normalise inside.

    Raises:
        ShapeError: T is not 4k + 1, or channels or mel bins do not fit.
        ConfigError: tiles in height and width are asked for.
    """

    family = "ltx2"
    component = "audio"
    sample_layout = "(B, C, T, M)"

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        arch = self.arch = _arch(config)
        if config.use_tiling:
            raise ConfigError(_NO_TILES)
        if config.load_encoder:
            self.encoder = Encoder(arch)
        if config.load_decoder:
            self.decoder = Decoder(arch)
        self.register_buffer("latents_mean", torch.zeros(arch.base_channels))
        self.register_buffer("latents_std", torch.ones(arch.base_channels))

    @property
    def sample_axes(self) -> tuple[Axis, ...]:
        return (Axis(up=self.arch.ratio, lead=self.arch.ratio - 1), Axis(up=self.arch.ratio))

    @property
    def channels(self) -> tuple[int, int]:
        return self.arch.in_channels, self.arch.latent_channels

    @property
    def sampling_rate(self) -> int:
        """Of the waveforms that spectrograms are made of, in Hz."""
        return self.arch.sample_rate

    @property
    def hop_length(self) -> int:
        """Samples, at that rate, of a latent."""
        return self.arch.mel_hop_length * self.arch.ratio

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames that a latent stands for."""
        return self.arch.ratio

    @property
    def mel_compression_ratio(self) -> int:
        """Mel bins that a latent stands for."""
        return self.arch.ratio

    def waveform_to_mel(self, x_BCS: Tensor, sampling_rate: int) -> Tensor:
        """Waveforms (B, 2, S) in [-1, 1], of any rate, to spectrograms (B, 2, T, 64) as the network takes them.

        T = 1 + S // 160, of the samples at 16 kHz. See `mel.log_mel`.
        """
        arch = self.arch
        return log_mel(x_BCS, sampling_rate, target_rate=arch.sample_rate, hop=arch.mel_hop_length, bins=arch.mel_bins)

    def posterior(self, parameters: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(parameters)

    def normalize_latents(self, z: Tensor) -> Tensor:
        """(z - mean) / std, with statistics for every channel and mel bin."""
        mean, std = self._statistics(z)
        return (z - mean) / std

    def denormalize_latents(self, z: Tensor) -> Tensor:
        """z * std + mean."""
        mean, std = self._statistics(z)
        return z * std + mean

    def enable_tiling(
        self, tile_sample_min_height: int | None = None, tile_sample_min_width: int | None = None
    ) -> None:
        raise ConfigError(_NO_TILES)

    def encode_steps(self) -> list[Step]:
        """The whole encoder, with the frames before that it needs."""
        ratio = self.arch.ratio
        axes = (
            Axis(down=ratio, lead=ratio - 1, before=max(self.encoder.reach - ratio + 1, 0)),
            Axis(down=ratio, whole=True),
        )
        return [Step(name="encoder", run=lambda grids, _: self._encode(grids[0]), axes=axes)]

    def decode_steps(self) -> list[Step]:
        """The whole decoder, with the latents before that it needs."""
        ratio = self.arch.ratio
        axes = (Axis(up=ratio, lead=ratio - 1, before=self.decoder.reach), Axis(up=ratio, whole=True))
        return [Step(name="decoder", run=lambda grids, _: self._decode(grids[0]), axes=axes)]

    def _encode(self, x_BCTM: Tensor) -> Tensor:
        return self.encoder(x_BCTM)

    def _decode(self, z_BCtm: Tensor) -> Tensor:
        return self.decoder(z_BCtm)

    def _stream(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Pieces along time, each as soon as everything that it depends on has come; of at most 512 latents.

        A piece is computed with its context around it, so feed some hundred frames at a time unless latency matters.
        """
        next(self._half_parameters(direction))  # refuses a half that is not loaded
        axis = self._steps(direction)[0].axes[0]
        tile = _PIECE if direction == "encode" else _PIECE * self.arch.ratio
        checked = self._checked(direction, chunks)
        return slide(axis, checked, lambda crop: self._run(direction, crop, None), tile)

    def _checked(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The chunks, each of the right layout and all together of a legal length."""
        batch, total = 0, 0
        for chunk in chunks:
            self._check_layout(direction, chunk.shape)
            batch, total = batch or len(chunk), total + chunk.shape[2]
            if len(chunk) != batch:
                raise ShapeError(f"all chunks of a stream need the same batch, got {batch} and then {len(chunk)}")
            yield chunk
        if batch and direction == "encode":
            self.encoded_shape((batch, self.channels[0], total, self.arch.mel_bins))

    def _check_layout(self, direction: Direction, shape: Sequence[int]) -> None:
        super()._check_layout(direction, shape)
        bins = self.arch.mel_bins if direction == "encode" else self.arch.mel_bins // self.arch.ratio
        if shape[3] != bins:
            raise ShapeError(f"{direction} takes {bins} mel bins, got {tuple(shape)}; waveform_to_mel makes them")

    def _configured_tile(self, shape: Sequence[int], output: Sequence[int]) -> tuple[int, ...] | None:
        if self.config.use_tiling:
            raise ConfigError(_NO_TILES)
        return None

    def _budget_tiles(self, direction: Direction, shape: Sequence[int], output: Sequence[int]) -> list[tuple[int, ...]]:
        lengths = ((_PIECE >> halvings) * self.arch.ratio for halvings in range(_PIECE.bit_length()))
        longest = max(shape[2], output[2])
        return [(length, self.arch.mel_bins) for length in lengths if length < longest]

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, self.arch.latent_channels, 1, -1)
        return self.latents_mean.to(z).view(shape), self.latents_std.to(z).view(shape)


class Encoder(nn.Module):
    """(B, C, T, M) -> (B, 2z, t, m): mean and log variance."""

    def __init__(self, arch: LTX2AudioArchConfig) -> None:
        super().__init__()
        widths, blocks = arch.widths, arch.num_res_blocks
        self.conv_in = CausalConv2d(arch.in_channels, arch.base_channels)
        self.down = Modules[DownLevel](
            DownLevel(before, after, blocks, last=index == len(widths) - 1)
            for index, (before, after) in enumerate(itertools.pairwise((arch.base_channels, *widths)))
        )
        self.mid = MidBlock(widths[-1])
        self.conv_out = CausalConv2d(widths[-1], 2 * arch.latent_channels)
        # How many frames before its own a latent depends on.
        self.reach = 2 + 8 + 4 * blocks
        for _ in widths[1:]:
            self.reach = 2 * self.reach + 2 + 4 * blocks
        self.reach += 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return norm_silu_conv(self.mid(x), self.conv_out)


class Decoder(nn.Module):
    """(B, z, t, m) -> (B, C, T, M)."""

    def __init__(self, arch: LTX2AudioArchConfig) -> None:
        super().__init__()
        widths, blocks = arch.widths, arch.num_res_blocks + 1
        self.conv_in = CausalConv2d(arch.latent_channels, widths[-1])
        self.mid = MidBlock(widths[-1])
        # In the files the finest level comes first, and runs last.
        self.up = Modules[UpLevel](
            UpLevel(before, after, blocks, last=index == 0)
            for index, (after, before) in enumerate(itertools.pairwise((*widths, widths[-1])))
        )
        self.conv_out = CausalConv2d(widths[0], arch.output_channels)
        # How many latents before its own a frame depends on.
        self.reach = 2 + 4 * blocks
        for _ in widths[1:]:
            self.reach = (self.reach + 3) // 2 + 1 + 4 * blocks
        self.reach += 8 + 2

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for index in reversed(range(len(self.up))):
            x = self.up[index](x)
        return norm_silu_conv(x, self.conv_out)


class DownLevel(nn.Module):
    """Residual blocks, then half the frames and mel bins."""

    def __init__(self, before: int, after: int, blocks: int, last: bool) -> None:
        super().__init__()
        self.block = Modules[ResidualBlock](_blocks(before, after, blocks))
        self.downsample = nn.Identity() if last else Downsample(after)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.downsample(x)


class UpLevel(nn.Module):
    """Residual blocks, then twice the frames, less the first, and twice the mel bins."""

    def __init__(self, before: int, after: int, blocks: int, last: bool) -> None:
        super().__init__()
        self.block = Modules[ResidualBlock](_blocks(before, after, blocks))
        self.upsample = nn.Identity() if last else Upsample(after)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(x)


class MidBlock(nn.Module):
    """Two residual blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width)
        self.block_2 = ResidualBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; added to the input, through a linear map where the width changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = CausalConv2d(before, after)
        self.conv2 = CausalConv2d(after, after)
        self.nin_shortcut = nn.Identity() if before == after else CausalConv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu_conv(norm_silu_conv(x, self.conv1), self.conv2)
        return self.nin_shortcut(x) + h


class CausalConv2d(nn.Module):
    """A convolution behind zeros: all of them before the first frame, as many on both sides of the mel bins."""

    def __init__(self, before: int, after: int, kernel: int = 3) -> None:
        super().__init__()
        self.pads = (kernel // 2, kernel // 2, kernel - 1, 0)
        self.conv = nn.Conv2d(before, after, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pads))


class Downsample(nn.Module):
    """Half the frames and mel bins: zeros before the first frame and above the last bin, then a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 2, 0)))


class Upsample(nn.Module):
    """Twice the frames and mel bins: nearest neighbour, then a convolution; the first frame is dropped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.nearest = Nearest()
        self.conv = CausalConv2d(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.nearest(x))[:, :, 1:]


def norm_silu_conv(x: Tensor, conv: CausalConv2d) -> Tensor:
    """conv(norm_silu(x)). On a GPU the activation is written straight into the padded input of the convolution: a
    network this small is little more than the cost of launching its kernels."""
    if not _fuses(x, conv.conv.weight):
        return conv(norm_silu(x))
    # Imported here because Triton takes a second to import and only GPUs need it.
    if _plain(x):
        from fastvideo_vae_core.ops.kernels.pixel_norm import norm_silu_padded

        return conv.conv(norm_silu_padded(x, conv.pads, EPS))
    from fastvideo_vae_core.ops.kernels.rms_norm import norm_silu_into

    bins, _, before, _ = conv.pads
    rows_BTMC = x.movedim(1, -1)
    batch, frames, width, channels = rows_BTMC.shape
    window = x.new_zeros(batch, 1, before + frames, width + 2 * bins, channels)
    norm_silu_into(window, rows_BTMC.unsqueeze(1), None, None, taps=1, shift=0, inset=(before, bins), eps=EPS)
    return conv.conv(window[:, 0].movedim(-1, 1))


def norm_silu(x: Tensor) -> Tensor:
    """SiLU of x (B, C, T, M) over the root of its mean square along the channels, in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = wide / (wide.square().mean(1, keepdim=True) + EPS).sqrt()
    return F.silu(normal, inplace=not normal.requires_grad).to(x.dtype)


def _blocks(before: int, after: int, count: int) -> Iterator[ResidualBlock]:
    return (ResidualBlock(after if each else before, after) for each in range(count))


def _fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take this: on a GPU, at most float32, and nothing to differentiate."""
    differentiates = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return device_of(x).type == "cuda" and _HAS_TRITON and x.dtype != torch.float64 and not differentiates


def _plain(x: Tensor) -> bool:
    """Whether convolutions on a GPU lie in the plain layout; 16 bits are channels-last there."""
    return x.dtype == torch.float32


def _arch(config: VAEConfig) -> LTX2AudioArchConfig:
    assert isinstance(config.arch_config, LTX2AudioArchConfig)
    return config.arch_config


_HAS_TRITON = importlib.util.find_spec("triton") is not None
_NO_TILES = (
    "tiles in height and width are for pictures; spectrograms are cut along time alone: leave use_tiling off, or pass"
    " tile=(frames, mel bins) to plan_encode and plan_decode"
)
