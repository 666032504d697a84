"""Oobleck, the audio autoencoder of Stable Audio.

Shape legend: B batch, C channels; S samples, s latents.
Source: Stability-AI/stable-audio-tools `stable_audio_tools/models/autoencoders.py`. Parameters have diffusers' names;
the weight norm of the convolutions is folded into their weights when a checkpoint is opened.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import ConfigError, ShapeError
from fastvideo_vae_core.latents import scale_latents, unscale_latents
from fastvideo_vae_core.ops.conv1d import arrange, conv1d, dilated1d, formulation, needs, room, upsample1d
from fastvideo_vae_core.ops.modules import Modules
from fastvideo_vae_core.ops.snake import Snake, snake_pointwise
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.rehearsal import device_of
from fastvideo_vae_core.sharding import Sharding
from fastvideo_vae_core.tiling import Axis, Step, run_steps, slide
from fastvideo_vae_core.vae import ParallelTiledVAE
from fastvideo_vae_oobleck.config import OobleckArchConfig
from fastvideo_vae_oobleck.distribution import OobleckDiagonalGaussianDistribution

# Latents of a piece where audio is computed in pieces: 24 s of Stable Audio, of which 4 % are computed twice.
_PIECE = 512


class AutoencoderOobleck(ParallelTiledVAE[OobleckDiagonalGaussianDistribution]):
    """Audio in [-1, 1] to a diagonal Gaussian over latents, and back.

    (B, 2, S) -> (B, 64, S / 2048); S a multiple of 2048 (1920 for ACE-Step), or less by what odd strides lose.
    For example (1, 2, 2097152), 47.5 s at 44.1 kHz, -> (1, 64, 1024). The decoder does not clamp.

    Nothing reaches further than the context of a few latents, so audio of any length is computed in pieces that have
    it around them, with the same numbers as at once. That happens by itself above 1024 latents.

    Raises:
        ShapeError: S is no length that the decoder gives, or the channels do not fit.
        ConfigError: tiles in height and width are asked for.
    """

    family = "oobleck"
    sample_layout = "(B, C, S)"
    padding_mode = "constant"

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        self.arch = _arch(config)
        if config.use_tiling:
            raise ConfigError(_NO_TILES)
        if config.load_encoder:
            self.encoder = Encoder(self.arch)
        if config.load_decoder:
            self.decoder = Decoder(self.arch)

    @property
    def sample_axes(self) -> tuple[Axis, ...]:
        return (Axis(up=self.arch.hop_length, lead=self.arch.lead),)

    @property
    def channels(self) -> tuple[int, int]:
        return self.arch.audio_channels, self.arch.decoder_input_channels

    @property
    def sampling_rate(self) -> int:
        """Samples a second."""
        return self.arch.sampling_rate

    @property
    def hop_length(self) -> int:
        """Samples of a latent."""
        return self.arch.hop_length

    def posterior(self, parameters: Tensor) -> OobleckDiagonalGaussianDistribution:
        return OobleckDiagonalGaussianDistribution(parameters)

    def normalize_latents(self, z: Tensor) -> Tensor:
        """z * scaling, which is 1 in the published checkpoints."""
        return scale_latents(z, self.arch.scaling_factor)

    def denormalize_latents(self, z: Tensor) -> Tensor:
        """z / scaling."""
        return unscale_latents(z, self.arch.scaling_factor)

    def enable_tiling(
        self, tile_sample_min_height: int | None = None, tile_sample_min_width: int | None = None
    ) -> None:
        raise ConfigError(_NO_TILES)

    def encode_steps(self) -> list[Step]:
        """The whole encoder, with the context that it needs: a piece of audio goes through all layers at once."""
        return [Step(name="encoder", run=lambda grids, _: self._encode(grids[0]), axes=(self.encoder.axis(),))]

    def decode_steps(self) -> list[Step]:
        """The whole decoder, with the context that it needs."""
        return [Step(name="decoder", run=lambda grids, _: self._decode(grids[0]), axes=(self.decoder.axis(),))]

    def encode_chunked(self, x: Tensor, chunk_size: int = 128, overlap: int = 32) -> Tensor:
        """The mean (B, z, s) as stable-audio-tools computes it with `chunked=True`, for comparison with its numbers.

        Chunks overlap by `overlap` latents, and the middles are put side by side; with less than twice the context
        they have seams. `encode` has none.
        """
        hop = self.arch.hop_length
        starts = _chunk_starts(x.shape[-1] // hop, chunk_size, overlap)
        chunks = (self.encode(x[..., at * hop : (at + chunk_size) * hop]).latent_dist.mode() for at in starts)
        return _paste(chunks, starts, chunk_size, overlap, 1)

    def decode_chunked(self, z: Tensor, chunk_size: int = 128, overlap: int = 32) -> Tensor:
        """Samples (B, C, S) as stable-audio-tools computes them with `chunked=True`; see `encode_chunked`."""
        starts = _chunk_starts(z.shape[-1], chunk_size, overlap)
        chunks = (self.decode(z[..., at : at + chunk_size]).sample for at in starts)
        return _paste(chunks, starts, chunk_size, overlap, self.arch.hop_length)

    def _encode(self, x_BCS: Tensor) -> Tensor:
        return self.encoder(x_BCS)

    def _decode(self, z_BCs: Tensor) -> Tensor:
        return self.decoder(z_BCs)

    def _plan(
        self,
        direction: Direction,
        shape: tuple[int, ...],
        memory_budget: int | str | None = None,
        tile: Sequence[int] | None = None,
        items: int | None = None,
        chunk: int | None = None,
    ) -> Plan:
        self._check_layout(direction, shape)
        latents = shape[2] if direction == "decode" else shape[2] // self.arch.hop_length
        if tile is None and latents > 2 * _PIECE:
            tile = (_PIECE * self.arch.hop_length,)
        plan = super()._plan(direction, shape, memory_budget, tile, items, chunk)
        if plan.tile is None:
            return plan
        (axis,) = self._steps(direction)[0].axes
        context = f"{axis.before // axis.down} latents of context before and {axis.after // axis.down} behind a piece"
        return replace(plan, notes=(*plan.notes, context))

    def _formulation(self, direction: Direction, dtype: torch.dtype) -> tuple[str, ...]:
        return (formulation(self.device, dtype),)

    def _configured_tile(self, shape: Sequence[int], output: Sequence[int]) -> tuple[int, ...] | None:
        if self.config.use_tiling:
            raise ConfigError(_NO_TILES)
        return None

    def _budget_tiles(self, direction: Direction, shape: Sequence[int], output: Sequence[int]) -> list[tuple[int, ...]]:
        return [((_PIECE >> halvings) * self.arch.hop_length,) for halvings in range(_PIECE.bit_length())]

    def _stream(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Pieces along time, each as soon as everything that it depends on has come; of at most 512 latents.

        A piece is computed with its context around it, so feed some hundred latents at a time unless latency matters.
        Only the context is held between pieces. The pieces of all chunks together are what one call would give.
        """
        return self._slid(direction, chunks, 1, lambda crop: self._plan(direction, tuple(crop.shape)))

    def _shared_stream(self, direction: Direction, chunks: Iterable[Tensor], sharding: Sharding) -> Iterator[Tensor]:
        """The same with pieces as many times longer as there are ranks."""

        def plan(crop: Tensor) -> Plan:
            return self._planned(direction, tuple(crop.shape), mesh=sharding)

        return self._slid(direction, chunks, sharding.world, plan)

    def _slid(
        self, direction: Direction, chunks: Iterable[Tensor], times: int, plan: Callable[[Tensor], Plan]
    ) -> Iterator[Tensor]:
        next(self._half_parameters(direction))  # refuses a half that is not loaded
        (axis,) = self._steps(direction)[0].axes
        tile = times * (_PIECE if direction == "encode" else _PIECE * self.arch.hop_length)
        return slide(axis, self._checked(direction, chunks), lambda crop: self._run(direction, crop, plan(crop)), tile)

    def _checked(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The chunks, each of the right layout and all together of a legal length."""
        batch, total = 0, 0
        for chunk in chunks:
            self._check_layout(direction, chunk.shape)
            batch, total = batch or len(chunk), total + chunk.shape[2]
            if len(chunk) != batch:
                raise ShapeError(f"all chunks of a stream need the same batch, got {batch} and then {len(chunk)}")
            yield chunk
        if batch:
            shape = (batch, self.channels[direction == "decode"], total)
            self.encoded_shape(shape) if direction == "encode" else self.decoded_shape(shape)


class Half(nn.Module):
    """What both halves are: a convolution, a block for every stride, Snake and a convolution."""

    conv1: nn.Conv1d
    block: Modules[EncoderBlock] | Modules[DecoderBlock]
    snake1: Snake
    conv2: nn.Conv1d

    def forward(self, x: Tensor) -> Tensor:
        if self._fits_cache(x):
            x = x.contiguous()
            for stage in range(len(self.block)):
                x = self._in_cache(stage, x)
            return x
        y = Sum(arrange(x))
        # Part by part, so that nothing holds a part's input any longer.
        for stage in range(len(self.block)):
            for part in self._parts(stage):
                y = part(y)
        return y.value().contiguous()

    def axis(self) -> Axis:
        """How the result depends on the input: the reach of all layers together."""
        return _reach(self._needs, [block.axis for block in self.block])

    def _parts(self, index: int) -> Iterator[Callable[[Sum], Sum]]:
        """A block, behind the first convolution if it is the first, and before the last one if it is the last."""
        if index == 0:
            yield lambda x: conv1d(x.value(), self.conv1)
        yield from self.block[index].parts()
        if index == len(self.block) - 1:
            yield lambda x: conv1d(self.snake1(x), self.conv2)

    def _stage(self, index: int, x: Sum) -> Sum:
        for part in self._parts(index):
            x = part(x)
        return x

    def _in_cache(self, index: int, x: Tensor) -> Tensor:
        """A stage in pieces that stay in the cache of a CPU, where large tensors cost more than arithmetic."""
        block = self.block[index]
        step = Step(
            name=f"block.{index}",
            run=lambda grids, _: self._stage(index, Sum(grids[0])).value(),
            axes=(_reach(partial(self._stage_needs, index), [block.axis]),),
        )
        return run_steps([step], x, (max(_CACHED // block.width, 1),))

    def _fits_cache(self, x: Tensor) -> bool:
        # The pieces of a stage whose stride is 1 have no law that an Axis can say, and gradients need no pieces.
        trained = torch.is_grad_enabled() and (x.requires_grad or self.conv1.weight.requires_grad)
        return (
            device_of(x).type == "cpu"
            and not trained
            and all(block.axis.up > 1 or block.axis.down > 1 for block in self.block)
        )

    def _needs(self, first: int, last: int) -> tuple[int, int]:
        """The inputs [a, b] that the outputs [first, last] are made from; what lies beyond the ends is padding."""
        for stage in reversed(range(len(self.block))):
            first, last = self._stage_needs(stage, first, last)
        return first, last

    def _stage_needs(self, index: int, first: int, last: int) -> tuple[int, int]:
        if index == len(self.block) - 1:
            first, last = needs(self.conv2, first, last)
        first, last = self.block[index].needs(first, last)
        return needs(self.conv1, first, last) if index == 0 else (first, last)


class Encoder(Half):
    """(B, 2, S) -> (B, 2z, s): mean and scale."""

    def __init__(self, arch: OobleckArchConfig) -> None:
        super().__init__()
        base = arch.encoder_hidden_size
        widths = [base * multiple for multiple in (1, *arch.channel_multiples)]
        self.conv1 = nn.Conv1d(arch.audio_channels, base, 7, padding=3)
        self.block = Modules[EncoderBlock](
            EncoderBlock(before, after, stride)
            for (before, after), stride in zip(itertools.pairwise(widths), arch.downsampling_ratios, strict=True)
        )
        self.snake1 = Snake(widths[-1])
        self.conv2 = nn.Conv1d(widths[-1], base, 3, padding=1)


class Decoder(Half):
    """(B, z, s) -> (B, 2, S)."""

    def __init__(self, arch: OobleckArchConfig) -> None:
        super().__init__()
        base = arch.decoder_channels
        widths = [base * multiple for multiple in (*arch.channel_multiples[::-1], 1)]
        self.conv1 = nn.Conv1d(arch.decoder_input_channels, widths[0], 7, padding=3)
        self.block = Modules[DecoderBlock](
            DecoderBlock(before, after, stride)
            for (before, after), stride in zip(itertools.pairwise(widths), arch.downsampling_ratios[::-1], strict=True)
        )
        self.snake1 = Snake(base)
        self.conv2 = nn.Conv1d(base, arch.audio_channels, 7, padding=3, bias=False)


class EncoderBlock(nn.Module):
    """Three residual units, then `stride` times fewer samples; an odd stride makes one of its outputs more."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.axis = Axis(down=stride, lead=stride % 2)
        self.width = before
        self.res_unit1 = ResidualUnit(before, dilation=1)
        self.res_unit2 = ResidualUnit(before, dilation=3)
        self.res_unit3 = ResidualUnit(before, dilation=9)
        self.snake1 = Snake(before)
        self.conv1 = nn.Conv1d(before, after, 2 * stride, stride, math.ceil(stride / 2))

    def parts(self) -> Sequence[Callable[[Sum], Sum]]:
        """What the block does, in order."""
        return self.res_unit1, self.res_unit2, self.res_unit3, lambda x: conv1d(self.snake1(x), self.conv1)

    def needs(self, first: int, last: int) -> tuple[int, int]:
        first, last = needs(self.conv1, first, last)
        for unit in (self.res_unit3, self.res_unit2, self.res_unit1):
            first, last = unit.needs(first, last)
        return first, last


class DecoderBlock(nn.Module):
    """`stride` times more samples, of which an odd stride loses one, then three residual units."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.axis = Axis(up=stride, lead=stride % 2)
        self.width = after
        self.snake1 = Snake(before)
        self.conv_t1 = nn.ConvTranspose1d(before, after, 2 * stride, stride, math.ceil(stride / 2))
        self.res_unit1 = ResidualUnit(after, dilation=1)
        self.res_unit2 = ResidualUnit(after, dilation=3)
        self.res_unit3 = ResidualUnit(after, dilation=9)

    def parts(self) -> Sequence[Callable[[Sum], Sum]]:
        """What the block does, in order."""
        return lambda x: upsample1d(self.snake1(x), self.conv_t1), self.res_unit1, self.res_unit2, self.res_unit3

    def needs(self, first: int, last: int) -> tuple[int, int]:
        for unit in (self.res_unit3, self.res_unit2, self.res_unit1):
            first, last = unit.needs(first, last)
        return needs(self.conv_t1, first, last)


class ResidualUnit(nn.Module):
    """Snake, a dilated convolution, Snake, a pointwise one; added to the input."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.snake1 = Snake(width)
        self.conv1 = nn.Conv1d(width, width, 7, dilation=dilation, padding=3 * dilation)
        self.snake2 = Snake(width)
        self.conv2 = nn.Conv1d(width, width, 1)

    def forward(self, x: Sum) -> Sum:
        skip, y = self.snake1.fork(x, room(x.x, self.conv1))
        made = dilated1d(y, self.conv1, skip.shape[2])
        del y
        return snake_pointwise(made, self.snake2, self.conv2, skip)

    def needs(self, first: int, last: int) -> tuple[int, int]:
        return needs(self.conv1, first, last)


# Numbers of a stage that a CPU works on at a time: 8 MiB in float32.
_CACHED = 1 << 21

_NO_TILES = (
    "tiles in height and width are for pictures; audio has neither, and is computed in pieces along time by itself:"
    " leave use_tiling off, or pass tile=(length,) to plan_encode and plan_decode"
)


def _arch(config: VAEConfig) -> OobleckArchConfig:
    assert isinstance(config.arch_config, OobleckArchConfig)
    return config.arch_config


def _reach(needs: Callable[[int, int], tuple[int, int]], axes: Sequence[Axis]) -> Axis:
    """The axis of layers in a row, which change the resolution like `axes`, with the context that all of them need."""
    up, down = (math.prod(getattr(axis, name) for axis in axes) for name in ("up", "down"))
    if down > 1:
        lead = 0
        for axis in reversed(axes):
            lead = lead * axis.down + axis.lead
        first, last = needs(0, 0)
        # Whole steps of the stride, so that every piece has a length of its law.
        before, after = (down * -(-reach // down) for reach in (-first - lead, last + 1 - down + lead))
        return Axis(down=down, lead=lead, before=before, after=after)
    lead = 0
    for axis in axes:
        lead = lead * axis.up + axis.lead
    # The first output element that the second input element stands for, and the last one of the first.
    first, _ = needs(up - lead, up - lead)
    _, last = needs(up - lead - 1, up - lead - 1)
    return Axis(up=up, lead=lead, before=1 - first, after=last)


def _chunk_starts(latents: int, size: int, overlap: int) -> list[int]:
    """Where the official chunks begin: every size - overlap latents, and the last one ends with the signal."""
    if not 0 <= overlap < size <= latents:
        raise ShapeError(f"chunks of {size} latents with an overlap of {overlap} need at least {size}, got {latents}")
    starts = list(range(0, latents - size + 1, size - overlap))
    return starts if starts[-1] + size == latents else [*starts, latents - size]


def _paste(chunks: Iterable[Tensor], starts: Sequence[int], size: int, overlap: int, up: int) -> Tensor:
    """Put the chunks side by side, each without half an overlap at its inner ends."""
    pieces = []
    for index, (chunk, start) in enumerate(zip(chunks, starts, strict=True)):
        begin = overlap // 2 if index else 0
        # A chunk ends where the middle of the next one begins.
        end = starts[index + 1] + overlap // 2 - start if index + 1 < len(starts) else size
        pieces.append(chunk[..., begin * up : end * up])
    return torch.cat(pieces, dim=-1)
