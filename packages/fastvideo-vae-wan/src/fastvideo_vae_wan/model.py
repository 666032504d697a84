"""The video autoencoders of Wan 2.1 and Wan 2.2.

Shape legend: B batch, C channels; T frames, H, W pixels; t, h, w latents.
Source: Wan-Video/Wan2.1 `wan/modules/vae.py`; Wan-Video/Wan2.2 `wan/modules/vae2_2.py`.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastvideo_vae_core.blending import Blend, BlendedTiles, Cut, blended_tiles
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.distribution import DiagonalGaussianDistribution
from fastvideo_vae_core.errors import ConfigError, ShapeError
from fastvideo_vae_core.finite import is_finite
from fastvideo_vae_core.ops.causal import Cache, formulation
from fastvideo_vae_core.ops.patches import patchify, unpatchify
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.sharding import Sharding
from fastvideo_vae_core.strips import run_strip
from fastvideo_vae_core.tiling import WHOLE, Axis, Step
from fastvideo_vae_core.units import Units
from fastvideo_vae_core.vae import ParallelTiledVAE
from fastvideo_vae_wan import streaming
from fastvideo_vae_wan.config import WanArchConfig
from fastvideo_vae_wan.network import Decoder, Encoder, Pointwise


class AutoencoderKLWan(ParallelTiledVAE[DiagonalGaussianDistribution]):
    """Video in [-1, 1] to a diagonal Gaussian over latents, and back.

    (B, 3, T, H, W) -> (B, z, 1 + (T - 1) / 4, H / 8, W / 8) with z = 16 (Wan 2.1), or / 16 with z = 48 (Wan 2.2);
    T = 4k + 1, H and W multiples of 8 or 16. For example (1, 3, 81, 480, 832) -> (1, 16, 21, 60, 104). Decoded video is
    clamped to [-1, 1], as diffusers and the official wrapper do; `decode_unclamped` is the network alone.

    Both halves are causal in time and run piece by piece, with the same result for all cuts.

    Raises:
        ShapeError: T is not 4k + 1, H or W is no multiple of the compression ratio, or the channels do not fit.
    """

    family = "wan"
    encoder_modules = ("encoder", "quant_conv")
    decoder_modules = ("decoder", "post_quant_conv")
    sample_layout = "(B, C, T, H, W)"

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        arch = self.arch = _arch(config)
        if config.load_encoder:
            self.encoder = Encoder(arch)
            self.quant_conv = Pointwise(2 * arch.z_dim, 2 * arch.z_dim)
        if config.load_decoder:
            self.decoder = Decoder(arch)
            self.post_quant_conv = Pointwise(arch.z_dim, arch.z_dim)

    @property
    def sample_axes(self) -> tuple[Axis, ...]:
        time, space = self.arch.scale_factor_temporal, self.arch.scale_factor_spatial
        assert time is not None
        assert space is not None
        return (Axis(up=time, lead=time - 1), Axis(up=space), Axis(up=space))

    @property
    def temperal_downsample(self) -> tuple[bool, ...]:
        """As in the configuration. diffusers' pipelines for video to video, VACE and animation ask the model for it."""
        return self.arch.temperal_downsample

    @property
    def channels(self) -> tuple[int, int]:
        return self.arch.in_channels // self.arch.patch**2, self.arch.z_dim

    def encoded_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        latents = super().encoded_shape(shape)
        # The official code of Wan 2.1 cuts such pictures; that of Wan 2.2 fails on them, and so there is nothing to do.
        if self.arch.is_residual and any(
            size % axis.up for size, axis in zip(shape[3:], self.sample_axes[1:], strict=True)
        ):
            raise ShapeError(f"{self._illegal(shape)}, or use pad_to_valid() and crop_to()")
        return latents

    def posterior(self, parameters: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(parameters)

    def normalize_latents(self, z: Tensor) -> Tensor:
        """(z - mean) * (1 / std), in at least float32."""
        mean, std = self._statistics(z)
        return ((z.to(mean.dtype) - mean) * (1.0 / std)).to(z.dtype)

    def denormalize_latents(self, z: Tensor) -> Tensor:
        """z / (1 / std) + mean, in at least float32."""
        mean, std = self._statistics(z)
        return (z.to(mean.dtype) / (1.0 / std) + mean).to(z.dtype)

    def decode_unclamped(self, z: Tensor) -> Tensor:
        """What the network makes of un-normalised latents; it may leave [-1, 1]. As the official inner class."""
        self.decoded_shape(z.shape)
        return self._decode(z.to(self._half_dtype("decode")))

    def _encode(
        self, x_BCTHW: Tensor, chunk: int | None = None, cache: Cache | None = None, units: Units | None = None
    ) -> Tensor:
        group = self.sample_axes[0].up
        frames = 1 + (x_BCTHW.shape[2] - 1) // group
        chunk = self._default_chunk("encode", x_BCTHW.shape) if chunk is None else chunk
        # Surplus frames get here only where the configuration wants the official behaviour, which drops them.
        x_BCTHW = x_BCTHW[:, :, : 1 + (frames - 1) * group]
        return streaming.run(
            self._encode_piece,
            x_BCTHW,
            piece=chunk * group,
            frames=frames,
            cache=cache or Cache(x_BCTHW.device),
            units=units,
        )

    def _decode(
        self, z_BCthw: Tensor, chunk: int | None = None, cache: Cache | None = None, units: Units | None = None
    ) -> Tensor:
        frames = self.sample_axes[0].output_size(z_BCthw.shape[2])
        chunk = self._default_chunk("decode", z_BCthw.shape) if chunk is None else chunk
        cache = cache or Cache(z_BCthw.device)
        return streaming.run(self._decode_piece, z_BCthw, piece=chunk, frames=frames, cache=cache, units=units)

    def _encode_piece(self, x_BCTHW: Tensor, cache: Cache) -> Tensor:
        return self.quant_conv(self.encoder(patchify(x_BCTHW, self.arch.patch), cache))

    def _decode_piece(self, z_BCthw: Tensor, cache: Cache) -> Tensor:
        return unpatchify(self.decoder(self.post_quant_conv(z_BCthw), cache), self.arch.patch)

    def encode_steps(self, chunk: int = 1, device: torch.device | None = None) -> list[Step]:
        """The levels, tile by tile, each through the whole time; then the middle, which attends to whole frames."""
        encoder, patch, (time, space, _) = self.encoder, self.arch.patch, self.sample_axes
        # In whole latents, because the averages of Wan 2.2 cannot take half a cell.
        halo = -(-encoder.halo * patch // space.up) * space.up

        def down(grids: Sequence[Tensor], _: object) -> Tensor:
            x = grids[0]
            return streaming.run(
                lambda piece, cache: encoder.down(patchify(piece, patch), cache),
                x,
                piece=chunk * time.up,
                frames=1 + (x.shape[2] - 1) // time.up,
                cache=Cache(device or x.device),
                memory_format=torch.channels_last_3d,
            )

        def middle(grids: Sequence[Tensor], _: object) -> Tensor:
            x = grids[0]
            return streaming.run(
                lambda piece, cache: self.quant_conv(encoder.middle(piece, cache)),
                x,
                piece=chunk,
                frames=x.shape[2],
                cache=Cache(device or x.device),
            )

        tiled = Axis(down=space.up, before=halo, after=halo)
        return [
            Step(name="down", run=down, axes=(Axis(down=time.up, lead=time.lead, whole=True), tiled, tiled)),
            Step(name="middle", run=middle, axes=(WHOLE,) * 3),
        ]

    def decode_steps(self, chunk: int = 1, device: torch.device | None = None) -> list[Step]:
        """The middle, which attends to whole frames; then the levels, tile by tile, each through the whole time."""
        decoder, patch, (time, space, _) = self.decoder, self.arch.patch, self.sample_axes
        halo = decoder.halo

        def middle(grids: Sequence[Tensor], _: object) -> Tensor:
            z = grids[0]
            return streaming.run(
                lambda piece, cache: decoder.middle(self.post_quant_conv(piece), cache),
                z,
                piece=chunk,
                frames=z.shape[2],
                cache=Cache(device or z.device),
                memory_format=torch.channels_last_3d,
            )

        def up(grids: Sequence[Tensor], _: object) -> Tensor:
            x = grids[0]
            return streaming.run(
                lambda piece, cache: unpatchify(decoder.up(piece, cache), patch),
                x,
                piece=chunk,
                frames=time.output_size(x.shape[2]),
                cache=Cache(device or x.device),
            )

        tiled = Axis(up=space.up, before=halo, after=halo)
        return [
            Step(name="middle", run=middle, axes=(WHOLE,) * 3),
            Step(name="up", run=up, axes=(Axis(up=time.up, lead=time.lead, whole=True), tiled, tiled)),
        ]

    def _execute(self, plan: Plan, x: Tensor, units: Units) -> Tensor:
        chunk, encodes = plan.chunk or 1, plan.direction == "encode"
        if encodes:
            x = x[:, :, : self.sample_axes[0].output_size(plan.output_shape[2])]
        if plan.tile is not None:
            steps = self.encode_steps if encodes else self.decode_steps
            return self._run_steps(plan, steps(chunk, plan.device), x, units)
        if not plan.in_steps:
            return super()._execute(plan, x, units)
        network = self._encode if encodes else self._decode
        channels = 2 * self.arch.z_dim if encodes else self.channels[0]
        return run_strip(lambda part, strip: network(part, chunk, Cache(plan.device, strip), units), x, plan, channels)

    def _at_once(self, plan: Plan, x: Tensor, units: Units) -> Tensor:
        network = self._encode if plan.direction == "encode" else self._decode
        return network(x, plan.chunk or 1, Cache(plan.device), units)

    def _blended_tiles(self, direction: Direction, shape: Sequence[int], blend: Blend) -> BlendedTiles:
        space, patch = self.sample_axes[1].up, self.arch.patch
        blend.check(self.sample_axes[0].up, space)
        if blend.frames is not None:
            raise ConfigError(f"Wan's networks stream in time and are not cut there; leave out frames={blend.frames}")
        cut = blend.cut("pixels", direction, space)
        if cut is not None and direction == "encode":
            # diffusers counts in patches here, but compares pixels with the size of a tile.
            stride, size, fade, keep = (count * patch for count in cut[:4])
            cut = Cut(stride, size, fade, keep, cut.limit)
        elif cut is not None:
            # And here it blends patches.
            cut = cut._replace(grain=patch)
        return blended_tiles(shape, None, cut)

    def _finish(self, direction: Direction, y: Tensor) -> Tensor:
        return y.clamp_(-1.0, 1.0) if direction == "decode" else y

    def _stream(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Pieces as soon as they are finished, from chunks of any lengths; only the cache is held between them.

        The first frame, or latent frame, is a piece of its own.

        Raises:
            ShapeError: a chunk does not continue the one before, or frames are left over that fill no latent.
        """
        cache = Cache(self.device)
        for _, made in self._made(direction, self._pieces(direction, chunks), cache):
            yield made

    def _shared_stream(self, direction: Direction, chunks: Iterable[Tensor], sharding: Sharding) -> Iterator[Tensor]:
        pieces = self._pieces(direction, chunks, sharding.world)
        first = next(pieces, None)
        if first is None:
            return
        strip = self._strip(direction, first, sharding)
        cache = Cache(self.device, strip)
        for piece, made in self._made(direction, itertools.chain([first], pieces), cache):
            frame = (*piece.shape[:2], 1, *piece.shape[3:])
            if direction == "encode":
                output = (len(piece), 2 * self.arch.z_dim, *self.encoded_shape(frame)[2:])
            else:
                output = self.decoded_shape(frame)
            sent = self._sent(direction, made, sharding)
            yield strip.assembled([] if strip.empty else [sent], output, sent)

    def _made(self, direction: Direction, pieces: Iterable[Tensor], cache: Cache) -> Iterator[tuple[Tensor, Tensor]]:
        """Each piece and what it makes; of a strip where the cache is that of one."""
        stored = self._half_dtype(direction)
        dtype, retry, _ = self._fp16(stored)
        model = self if dtype == stored else self._twin(direction, dtype)
        for piece in pieces:
            before = cache.copy() if retry else cache
            made = model._piece(direction, cache.own(piece).to(stored).to(dtype), cache)
            if retry and cache.agreed(not is_finite(made)):
                warnings.warn(f"{direction} overflowed in float16 and goes on in float32", stacklevel=3)
                dtype, retry, model = torch.float32, False, self._twin(direction, torch.float32)
                cache = before.handed_to(model, self, dtype)
                made = model._piece(direction, cache.own(piece).to(dtype), cache)
            cache.first = False
            yield piece, self._finish(direction, made.to(stored))

    def _pieces(self, direction: Direction, chunks: Iterable[Tensor], ranks: int = 1) -> Iterator[Tensor]:
        chunks = iter(chunks)
        first = next(chunks, None)
        if first is None:
            return iter(())
        group = self.sample_axes[0].up if direction == "encode" else 1
        piece = group * self._default_chunk(direction, first.shape) * ranks
        checked = self._checked(direction, itertools.chain([first], chunks))
        return streaming.cut(checked, piece=piece, group=group, surplus=self.config.illegal_sizes == "official")

    def _checked(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        fixed = None
        for chunk in chunks:
            frame = (*chunk.shape[:2], 1, *chunk.shape[3:])
            _ = self.encoded_shape(frame) if direction == "encode" else self.decoded_shape(frame)
            if fixed not in (None, frame):
                raise ShapeError(f"a chunk {tuple(chunk.shape)} does not continue frames of {fixed}")
            fixed = frame
            yield chunk

    def _piece(self, direction: Direction, x: Tensor, cache: Cache) -> Tensor:
        if cache.strip is not None and cache.strip.empty:
            return x
        if direction == "encode":
            return self._encode_piece(x, cache)
        return self._decode_piece(x, cache)

    def _chunk(
        self, direction: Direction, shape: Sequence[int], output: Sequence[int], asked: int | None
    ) -> int | None:
        latents = output[2] if direction == "encode" else shape[2]
        if asked is not None and asked < 1:
            raise ConfigError(f"a piece needs at least one latent frame, got chunk={asked}")
        if latents == 1:
            return None
        return min(self._default_chunk(direction, shape) if asked is None else asked, latents - 1)

    def _formulation(self, direction: Direction, dtype: torch.dtype) -> tuple[str, ...]:
        return formulation(self.encoder if direction == "encode" else self.decoder, self.device, dtype)

    def _default_chunk(self, direction: Direction, shape: Sequence[int]) -> int:
        """Latent frames of a piece, so that the widest feature map of a piece has some hundred megabytes."""
        arch, (time, space, _) = self.arch, self.sample_axes
        height, width = shape[3:] if direction == "encode" else (each * space.up for each in shape[3:])
        widest = arch.encoder_widths[0] if direction == "encode" else arch.decoder_widths[-1]
        frame = (height // arch.patch) * (width // arch.patch) * widest * self._half_dtype(direction).itemsize
        return max(1, min(_PIECE_BYTES // (time.up * frame), _MOST_LATENTS))

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(z.dtype, torch.float32)
        shape = (1, -1, *[1] * (z.ndim - 2))
        mean, std = self.arch.latents_mean, self.arch.latents_std
        return (
            torch.tensor(mean, dtype=dtype, device=z.device).view(shape),
            torch.tensor(std, dtype=dtype, device=z.device).view(shape),
        )


def _arch(config: VAEConfig) -> WanArchConfig:
    assert isinstance(config.arch_config, WanArchConfig)
    return config.arch_config


# Bytes of the widest feature map of a piece, and latent frames of one. Twice as many gained 8 % on an H100 at 480 x 832
# (848 to 785 ms) and took more memory than diffusers (3.7 to 5.4 GiB, 4.4 there).
_PIECE_BYTES = 576 << 20
_MOST_LATENTS = 8
