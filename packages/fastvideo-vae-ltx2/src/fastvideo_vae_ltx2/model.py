"""The video autoencoder of LTX-2.

Shape legend: B batch, C channels; T frames, H, W pixels; t, h, w latents.
Source: Lightricks/LTX-2 `ltx_core/model/video_vae`.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastvideo_vae_core.blending import Blend, BlendedTiles, blended_tiles
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.distribution import DiagonalGaussianDistribution, randn_like
from fastvideo_vae_core.errors import ConfigError, ShapeError
from fastvideo_vae_core.finite import is_finite
from fastvideo_vae_core.latents import scale_latents, unscale_latents
from fastvideo_vae_core.ops.causal import Cache, formulation
from fastvideo_vae_core.outputs import DecoderOutput
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.sharding import Sharding
from fastvideo_vae_core.strips import run_strip
from fastvideo_vae_core.tiling import Axis, Step
from fastvideo_vae_core.units import Progress, Units
from fastvideo_vae_core.vae import Mesh, ParallelTiledVAE
from fastvideo_vae_ltx2 import streaming
from fastvideo_vae_ltx2.blending import WeightedBlend
from fastvideo_vae_ltx2.config import LTX2VideoArchConfig
from fastvideo_vae_ltx2.network import Decoder, DownLevel, Encoder, UpLevel
from fastvideo_vae_ltx2.streaming import Stage

# The official settings of a decoder that takes a timestep.
DECODE_TIMESTEP = 0.05
DECODE_NOISE_SCALE = 0.025


class AutoencoderKLLTX2Video(ParallelTiledVAE[DiagonalGaussianDistribution]):
    """Video in [-1, 1] to a diagonal Gaussian over latents, and back.

    (B, 3, T, H, W) -> (B, 128, 1 + (T - 1) / 8, H / 32, W / 32); T = 8k + 1, H and W multiples of 32. For example
    (1, 3, 121, 512, 768) -> (1, 128, 16, 16, 24). One log variance stands for all channels of a latent. Decoded video
    is not clamped, as officially.

    Latents are not normalised here, as in diffusers; the official networks normalise inside, which is
    `normalize_latents(encode(x).latent_dist.mode())` and `decode(denormalize_latents(z))`.

    Both halves run piece by piece in time, with the same result for all cuts. The encoder is causal. The decoder is
    not, so a stream of it holds back some frames until it has seen what they depend on.

    Raises:
        ShapeError: T is not 8k + 1, H or W is no multiple of 32, or the channels do not fit.
    """

    family = "ltx2"
    component = "video"
    sample_layout = "(B, C, T, H, W)"

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        arch = self.arch = _arch(config)
        if config.load_encoder:
            self.encoder = Encoder(arch)
        if config.load_decoder:
            self.decoder = Decoder(arch)
        self.register_buffer("latents_mean", torch.zeros(arch.latent_channels))
        self.register_buffer("latents_std", torch.ones(arch.latent_channels))

    @property
    def sample_axes(self) -> tuple[Axis, ...]:
        time, space = self.arch.ratios
        return (Axis(up=time, lead=time - 1), Axis(up=space), Axis(up=space))

    @property
    def channels(self) -> tuple[int, int]:
        return self.arch.in_channels, self.arch.latent_channels

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames that a latent stands for."""
        return self.arch.ratios[0]

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels along each side that a latent stands for."""
        return self.arch.ratios[1]

    def encoded_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        latents = super().encoded_shape(shape)
        # The official code drops surplus frames and fails on such pictures.
        if any(size % axis.up for size, axis in zip(shape[3:], self.sample_axes[1:], strict=True)):
            raise ShapeError(f"{self._illegal(shape)}, or use pad_to_valid() and crop_to()")
        return latents

    def posterior(self, parameters: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(parameters)

    def normalize_latents(self, z: Tensor) -> Tensor:
        """(z - mean) * scaling / std, with a scaling of 1 in published checkpoints."""
        return scale_latents(z, self.arch.scaling_factor, mean=self.latents_mean, std=self.latents_std)

    def denormalize_latents(self, z: Tensor) -> Tensor:
        """z * std / scaling + mean."""
        return unscale_latents(z, self.arch.scaling_factor, mean=self.latents_mean, std=self.latents_std)

    def decode(  # type: ignore[override]  # pipelines pass the timestep in second place
        self,
        z: Tensor,
        temb: Tensor | float | None = None,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        plan: Plan | None = None,
        progress: Progress | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode un-normalised latents to video, nominally in [-1, 1].

        z: (B, C, t, h, w) on the model's device; computed in the decoder's dtype.
        temb: timestep of every item (B), or one for all, for decoders that take one; 0.05 by default.
        generator: for decoders that take a timestep: draws the noise that the official decoder mixes in, in normalised
            space. Without one nothing is mixed in, as in diffusers, whose pipelines do it themselves.
        plan, progress: as in `ParallelTiledVAE.decode`.

        Raises:
            ShapeError: z has the wrong number of axes or channels, or there is another number of timesteps.
            ConfigError: the decoder was not loaded or takes no timestep, or the plan is another call's.
        """
        self._check_layout("decode", z.shape)
        z = self._noisy(z, generator)
        if temb is None:
            sample = self._run("decode", z, plan, progress)
        else:
            plan = self._matching("decode", z, plan)
            timed = self._with_timestep(z, temb)
            sample = self._run("decode", timed, replace(plan, input_shape=tuple(timed.shape)), progress)
        return DecoderOutput(sample) if return_dict else (sample,)

    def decode_stream(
        self, z: Tensor | Iterable[Tensor], temb: Tensor | float | None = None, *, mesh: Mesh | None = None
    ) -> Iterator[Tensor]:
        """Yield each finished piece of the video; `temb` as in `decode`, `mesh` as in `encode_stream`."""
        chunks = (z,) if isinstance(z, Tensor) else z
        if temb is not None:
            chunks = (self._with_timestep(each, temb) for each in chunks)
        return self._streamed("decode", chunks, mesh)

    def _noisy(self, z: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        """Latents with the official noise."""
        if generator is None or not self.arch.timestep_conditioning:
            return z
        z = self.normalize_latents(z.to(self._half_dtype("decode")))
        noise = randn_like(z, generator) * DECODE_NOISE_SCALE
        return self.denormalize_latents(noise + (1.0 - DECODE_NOISE_SCALE) * z)

    def _with_timestep(self, z: Tensor, temb: Tensor | float) -> Tensor:
        """Latents with the timestep as one channel more, so that it goes the way of its item."""
        if not self.arch.timestep_conditioning:
            raise ConfigError("this decoder takes no timestep; leave out temb")
        self._check_layout("decode", z.shape)
        dtype = self._half_dtype("decode")
        timestep = torch.as_tensor(temb, dtype=dtype, device=z.device).flatten()
        if len(timestep) not in (1, len(z)):
            raise ShapeError(f"{len(z)} items need {len(z)} timesteps or one, got {len(timestep)}")
        channel = timestep.view(-1, 1, 1, 1, 1).expand(len(z), 1, *z.shape[2:])
        return torch.cat([z.to(dtype), channel], 1)

    def _timestep(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """The latents, and the timestep of each item where the decoder takes one."""
        if not self.arch.timestep_conditioning:
            return z, None
        if z.shape[1] == self.arch.latent_channels:
            return z, z.new_full((len(z),), DECODE_TIMESTEP)
        return z[:, :-1], z[:, -1, 0, 0, 0]

    def _encode(
        self, x_BCTHW: Tensor, chunk: int | None = None, cache: Cache | None = None, units: Units | None = None
    ) -> Tensor:
        group = self.arch.ratios[0]
        frames = 1 + (x_BCTHW.shape[2] - 1) // group
        chunk = self._default_chunk("encode", x_BCTHW.shape) if chunk is None else chunk
        # Surplus frames get here only where the configuration wants the official behaviour, which drops them.
        x_BCTHW = x_BCTHW[:, :, : 1 + (frames - 1) * group]
        made = streaming.run(
            self._encoder_stages(),
            x_BCTHW,
            first=1 + chunk * group,
            piece=chunk * group,
            frames=frames,
            cache=cache or Cache(x_BCTHW.device),
            units=units,
        )
        return self._spread_variance(made)

    def _decode(
        self, z_BCthw: Tensor, chunk: int | None = None, cache: Cache | None = None, units: Units | None = None
    ) -> Tensor:
        chunk = self._default_chunk("decode", z_BCthw.shape) if chunk is None else chunk
        z, timestep = self._timestep(z_BCthw)
        return streaming.run(
            self._decoder_stages(chunk, timestep),
            z,
            first=chunk,
            piece=chunk,
            frames=self.sample_axes[0].output_size(z.shape[2]),
            cache=cache or Cache(z.device),
            units=units,
        )

    def _spread_variance(self, made: Tensor) -> Tensor:
        """The one log variance, for every channel."""
        latents = self.arch.latent_channels
        return torch.cat([made[:, :latents], made[:, latents:].expand(-1, latents, -1, -1, -1)], 1)

    def encode_steps(self, chunk: int = 1, device: torch.device | None = None) -> list[Step]:
        """The levels one by one, tile by tile in space, each through the whole time."""
        encoder, time = self.encoder, self.arch.ratios[0]
        steps = []
        for index, level in enumerate(encoder.down_blocks):
            stride = level.downsamplers[0].stride
            first, patch = index == 0, encoder.patch if index == 0 else 1
            # Every convolution sees one position more on each side; whole steps of the stride, so that crops divide.
            down_by = patch * stride[1]
            halo = down_by * -(-(2 * len(level.resnets) + 1 + first) // stride[1])
            space = Axis(down=down_by, before=halo, after=halo)

            def down(x: Tensor, cache: Cache, level: DownLevel = level, first: bool = first) -> Tensor:
                return level(encoder.begin(x, cache) if first else x, cache)

            stage = Stage(down, chunk * time)
            steps.append(_step(f"down {index}", stage, _down(stride[0]), space, first=1, device=device))
            time //= stride[0]

        def middle(x: Tensor, cache: Cache) -> Tensor:
            return self._spread_variance(encoder.end(x, cache))

        halo = 2 * len(encoder.mid_block.resnets) + 1
        space = Axis(before=halo, after=halo)
        return [*steps, _step("middle", Stage(middle, chunk), _down(1), space, device=device)]

    def decode_steps(
        self, chunk: int = 1, device: torch.device | None = None, timestep: Tensor | None = None
    ) -> list[Step]:
        """The levels one by one, tile by tile in space, each through the whole time."""
        decoder = self.decoder
        if timestep is None and self.arch.timestep_conditioning:
            timestep = torch.full((1,), DECODE_TIMESTEP, dtype=self._half_dtype("decode"), device=self.device)
        stages = self._decoder_stages(chunk, timestep)
        halo = 2 * len(decoder.mid_block.resnets) + 1
        steps = [_step("middle", stages[0], _up(1), Axis(before=halo, after=halo), device=device)]
        for index, (level, stage) in enumerate(zip(decoder.up_blocks, stages[1:], strict=True)):
            time, space, _ = level.upsamplers[0].stride
            last = index == len(decoder.up_blocks) - 1
            # One position for the convolution before the change of resolution, the others are of the finer grid.
            halo = 1 + -(-(2 * len(level.resnets) + last) // space)
            up = Axis(up=space * (decoder.patch if last else 1), before=halo, after=halo)
            steps.append(_step(f"up {index}", stage, _up(time), up, device=device))
        return steps

    def _encoder_stages(self) -> list[Stage]:
        """A causal network gives what it has at once, so it is one stage and takes pieces as they come."""
        return [Stage(lambda x, cache: self.encoder(x, cache), _ANY)]

    def _decoder_stages(self, chunk: int, timestep: Tensor | None) -> list[Stage]:
        """The levels of the decoder, each of which takes the frames of so many latents at a time."""
        decoder = self.decoder

        def middle(z: Tensor, cache: Cache) -> Tensor:
            return decoder.begin(z, cache, decoder.time(timestep))

        stages, frames = [Stage(middle, chunk)], chunk
        for index, level in enumerate(decoder.up_blocks):
            last = index == len(decoder.up_blocks) - 1

            def up(x: Tensor, cache: Cache, level: UpLevel = level, last: bool = last) -> Tensor:
                time = decoder.time(timestep)
                x = level(x, cache, time)
                return decoder.end(x, cache, time) if last else x

            stages.append(Stage(up, frames))
            frames *= level.upsamplers[0].stride[0]
        return stages

    def _execute(self, plan: Plan, x: Tensor, units: Units) -> Tensor:
        chunk, encodes = plan.chunk or 1, plan.direction == "encode"
        if encodes:
            x = x[:, :, : self.sample_axes[0].output_size(plan.output_shape[2])]
        if plan.tile is not None:
            if encodes:
                return self._run_steps(plan, self.encode_steps(chunk, plan.device), x, units)
            z, timestep = self._timestep(x)
            return self._run_steps(plan, self.decode_steps(chunk, plan.device, timestep), z, units)
        if not plan.in_steps:
            return super()._execute(plan, x, units)
        network = self._encode if encodes else self._decode
        channels = 2 * self.arch.latent_channels if encodes else self.channels[0]
        return run_strip(lambda part, strip: network(part, chunk, Cache(plan.device, strip), units), x, plan, channels)

    def _at_once(self, plan: Plan, x: Tensor, units: Units) -> Tensor:
        network = self._encode if plan.direction == "encode" else self._decode
        return network(x, plan.chunk or 1, Cache(plan.device), units)

    def _blended_tiles(self, direction: Direction, shape: Sequence[int], blend: Blend) -> BlendedTiles:
        time, space = self.arch.ratios
        blend.check(time, space)
        if isinstance(blend, WeightedBlend):
            return blend.tiles(shape, direction, time, space)
        frames, pixels = blend.cut("frames", direction, time), blend.cut("pixels", direction, space)
        # diffusers drops the last frame of decoded tiles, where the first is the one too many.
        return blended_tiles(shape, frames, pixels, drops="first" if direction == "encode" else "last")

    def _stream(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Pieces as soon as they are final, from chunks of any lengths; only the cache is held between them.

        The first frame is encoded as a piece of its own. A decoder that is not causal holds frames back until it has
        seen the latents that they depend on.

        Raises:
            ShapeError: a chunk does not continue the one before, or frames are left over that fill no latent.
        """
        cache = Cache(self.device)
        for _, parts in self._made(direction, self._pieces(direction, chunks), cache):
            yield from parts

    def _shared_stream(self, direction: Direction, chunks: Iterable[Tensor], sharding: Sharding) -> Iterator[Tensor]:
        pieces = self._pieces(direction, chunks, sharding.world)
        first = next(pieces, None)
        if first is None:
            return
        strip, stored = self._strip(direction, first, sharding), self._half_dtype(direction)
        frame = (len(first), self.channels[direction == "decode"], 1, *first.shape[3:])
        if direction == "encode":
            output = (len(first), 2 * self.arch.latent_channels, *self.encoded_shape(frame)[2:])
        else:
            output = self.decoded_shape(frame)
        cache = Cache(self.device, strip)
        for piece, parts in self._made(direction, itertools.chain([first], pieces), cache):
            own = [self._sent(direction, part, sharding) for part in parts]
            like = self._sent(direction, piece.new_empty(0, dtype=stored), sharding)
            whole = strip.assembled(own, output, like)
            if whole.shape[2]:
                yield whole

    def _made(
        self, direction: Direction, pieces: Iterable[Tensor], cache: Cache
    ) -> Iterator[tuple[Tensor, Iterable[Tensor]]]:
        """Each piece and what it makes, in parts; of a strip where the cache is that of one."""
        stored = self._half_dtype(direction)
        dtype, retry, _ = self._fp16(stored)
        model = self if dtype == stored else self._twin(direction, dtype)
        timestep: Tensor | None = None
        # A causal half has given everything when the last piece is through.
        late = direction == "decode" and not self.arch.decoder_causal
        for piece, last in _ended(pieces) if late else ((piece, False) for piece in pieces):
            x = piece
            if direction == "decode":
                if piece.shape[2]:
                    timestep = self._timestep(piece)[1]
                x = piece[:, : self.arch.latent_channels]
            x = x.to(stored).to(dtype)
            if retry:
                before = cache.copy()
                made = list(model._flow(direction, x, last, cache, timestep))
                if not cache.agreed(not all(map(is_finite, made))):
                    yield piece, made
                    continue
                warnings.warn(f"{direction} overflowed in float16 and goes on in float32", stacklevel=3)
                dtype, retry, model = torch.float32, False, self._twin(direction, torch.float32)
                cache, x = before.handed_to(model, self, dtype), x.to(dtype)
            yield piece, (part.to(stored) for part in model._flow(direction, x, last, cache, timestep))

    def _pieces(self, direction: Direction, chunks: Iterable[Tensor], ranks: int = 1) -> Iterator[Tensor]:
        chunks = iter(chunks)
        first = next(chunks, None)
        if first is None:
            return iter(())
        group = self.arch.ratios[0] if direction == "encode" else 1
        piece = group * self._default_chunk(direction, first.shape) * ranks
        checked = self._checked(direction, itertools.chain([first], chunks))
        return streaming.cut(
            checked, first=1, piece=piece, group=group, surplus=self.config.illegal_sizes == "official"
        )

    def _checked(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        fixed = None
        for chunk in chunks:
            frame = (*chunk.shape[:2], 1, *chunk.shape[3:])
            if fixed is None:
                self._plan(direction, (frame[0], self.channels[direction == "decode"], *frame[2:]))
            if fixed not in (None, frame):
                raise ShapeError(f"a chunk {tuple(chunk.shape)} does not continue frames of {fixed}")
            fixed = frame
            yield chunk

    def _flow(
        self, direction: Direction, x: Tensor, last: bool, cache: Cache, timestep: Tensor | None
    ) -> Iterator[Tensor]:
        """What one piece of a stream makes, in parts."""
        if cache.strip is not None and cache.strip.empty:
            return iter(())
        pieces = [(cache.own(x), last)]
        if direction == "encode":
            made = streaming.flow(self._encoder_stages(), pieces, cache)
            return (self._spread_variance(each) for each in made)
        timestep = None if timestep is None else timestep.to(x.dtype)
        ranks = 1 if cache.strip is None else cache.strip.ranks.world
        chunk = self._default_chunk("decode", (*x.shape[:2], 1, *x.shape[3:])) * ranks
        return streaming.flow(self._decoder_stages(chunk, timestep), pieces, cache)

    def _plan(
        self,
        direction: Direction,
        shape: tuple[int, ...],
        memory_budget: int | str | None = None,
        tile: Sequence[int] | None = None,
        items: int | None = None,
        chunk: int | None = None,
    ) -> Plan:
        plan = super()._plan(direction, shape, memory_budget, tile, items, chunk)
        latents = plan.output_shape if direction == "encode" else shape
        border = getattr(self.arch, f"{direction}r_spatial_padding_mode")
        if border == "reflect" and min(latents[3:]) < 2:
            space = self.arch.ratios[1]
            raise ShapeError(
                f"this {direction}r reflects pictures at their borders and needs 2 x 2 latents, {2 * space} x"
                f" {2 * space} pixels, or more; got {tuple(shape)}"
            )
        return plan

    def _chunk(
        self, direction: Direction, shape: Sequence[int], output: Sequence[int], asked: int | None
    ) -> int | None:
        latents = output[2] if direction == "encode" else shape[2]
        if asked is not None and asked < 1:
            raise ConfigError(f"a piece needs at least one latent frame, got chunk={asked}")
        if latents == 1:
            return None
        return min(self._default_chunk(direction, shape) if asked is None else asked, latents)

    def _formulation(self, direction: Direction, dtype: torch.dtype) -> tuple[str, ...]:
        return formulation(self.encoder if direction == "encode" else self.decoder, self.device, dtype)

    def _default_chunk(self, direction: Direction, shape: Sequence[int]) -> int:
        """Latent frames of a piece, so that the widest feature map of a piece has about a gigabyte."""
        arch, (time, space) = self.arch, self.arch.ratios
        height, width = shape[3:] if direction == "encode" else (each * space for each in shape[3:])
        widest = arch.latent_channels if direction == "encode" else arch.decoder_widths[-1]
        frame = (height // arch.patch_size) * (width // arch.patch_size) * widest
        return max(1, _PIECE_BYTES // (time * frame * self._half_dtype(direction).itemsize))


def _step(
    name: str, stage: Stage, time: Axis, space: Axis, *, first: int = 0, device: torch.device | None = None
) -> Step:
    """A part of a network that is local in space, through the whole time; `first` frames come on top of a piece."""

    def run(grids: Sequence[Tensor], _: object) -> Tensor:
        x = grids[0]
        return streaming.run(
            [Stage(stage.network, stage.limit + first)],
            x,
            first=stage.limit + first,
            piece=stage.limit,
            frames=time.output_size(x.shape[2]),
            cache=Cache(device or x.device),
            memory_format=torch.channels_last_3d,
        )

    return Step(name=name, run=run, axes=(time, space, space))


def _down(stride: int) -> Axis:
    return Axis(down=stride, lead=stride - 1, whole=True)


def _up(stride: int) -> Axis:
    return Axis(up=stride, lead=stride - 1, whole=True)


def _ended(pieces: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """The pieces, and behind them one without frames that is the last."""
    piece: Tensor | None = None
    for piece in pieces:
        yield piece, False
    if piece is not None:
        yield piece[:, :, :0], True


def _arch(config: VAEConfig) -> LTX2VideoArchConfig:
    assert isinstance(config.arch_config, LTX2VideoArchConfig)
    return config.arch_config


# Bytes of the widest feature map of a piece.
_PIECE_BYTES = 1 << 30
# As many frames as there are.
_ANY = 1 << 62
