"""The causal video autoencoder of Hunyuan-GameCraft and HunyuanVideo.

Shape legend: B batch, C channels; T frames, H, W pixels; t, h, w latents.
Source: Tencent-Hunyuan/Hunyuan-GameCraft-1.0 `hymm_sp/vae/autoencoder_kl_causal_3d.py`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from fastvideo_vae_core.blending import Blend, BlendedTiles, blended_tiles
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.distribution import DiagonalGaussianDistribution
from fastvideo_vae_core.errors import ConfigError
from fastvideo_vae_core.latents import scale_latents, unscale_latents
from fastvideo_vae_core.ops.clip import CausalConv, Clip, Run, formulation
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.tiling import Axis, Step
from fastvideo_vae_core.units import Units
from fastvideo_vae_core.vae import ParallelTiledVAE
from fastvideo_vae_gamecraft.config import HunyuanVideoArchConfig
from fastvideo_vae_gamecraft.network import Decoder, Encoder, pointwise_step


class AutoencoderKLHunyuanVideo(ParallelTiledVAE[DiagonalGaussianDistribution]):
    """Video in [-1, 1] to a diagonal Gaussian over latents, and back.

    (B, 3, T, H, W) -> (B, 16, 1 + (T - 1) / 4, H / 8, W / 8); T = 4k + 1, H and W multiples of 8. For example
    (1, 3, 33, 704, 1216) -> (1, 16, 9, 88, 152). The decoder does not clamp. `VAEConfig(illegal_sizes="official")`
    takes any T, H and W, as the official code does, and gives 1 + (T - 1) // 4 latent frames and latents of what is
    left of 8 pixels too.

    Norms and attention span the clip, so a clip is computed as a whole, and a video that is cut is another video. The
    official code and diffusers cut nevertheless; `enable_blending` reproduces their numbers.

    Raises:
        ShapeError: T is not 4k + 1, H or W is no multiple of the compression ratio, or the channels do not fit.
    """

    family = "gamecraft"
    encoder_modules = ("encoder", "quant_conv")
    decoder_modules = ("decoder", "post_quant_conv")
    sample_layout = "(B, C, T, H, W)"

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        arch = self.arch = _arch(config)
        z = arch.latent_channels
        if config.load_encoder:
            self.encoder = Encoder(arch)
            self.quant_conv = nn.Conv3d(2 * z, 2 * z, 1)
        if config.load_decoder:
            self.decoder = Decoder(arch)
            self.post_quant_conv = nn.Conv3d(z, z, 1)

    @property
    def sample_axes(self) -> tuple[Axis, ...]:
        time, space = self.arch.temporal_compression_ratio, self.arch.spatial_compression_ratio
        return (Axis(up=time, lead=time - 1), Axis(up=space), Axis(up=space))

    @property
    def channels(self) -> tuple[int, int]:
        return self.arch.in_channels, self.arch.latent_channels

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels along each side of a latent, where diffusers' pipelines look for it."""
        return self.arch.spatial_compression_ratio

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames of a latent, where diffusers' pipelines look for it."""
        return self.arch.temporal_compression_ratio

    def encoded_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the latents of samples of that shape; see `ParallelTiledVAE.encoded_shape`."""
        # Sizes that do not divide get here only where the configuration wants the official behaviour.
        space = self.arch.spatial_compression_ratio
        return (*super().encoded_shape(shape)[:3], *(-(-size // space) for size in shape[3:]))

    def posterior(self, parameters: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(parameters)

    def normalize_latents(self, z: Tensor) -> Tensor:
        """z * scaling."""
        return scale_latents(z, self.arch.scaling_factor)

    def denormalize_latents(self, z: Tensor) -> Tensor:
        """z / scaling."""
        return unscale_latents(z, self.arch.scaling_factor)

    def encode_steps(self, run: Run | None = None) -> list[Step]:
        run = Run(self.device) if run is None else run
        return [*self.encoder.steps(run), pointwise_step("quant_conv", self.quant_conv)]

    def decode_steps(self, run: Run | None = None) -> list[Step]:
        run = Run(self.device) if run is None else run
        return [pointwise_step("post_quant_conv", self.post_quant_conv), *self.decoder.steps(run)]

    def _encode(self, x_BCTHW: Tensor, run: Run | None = None) -> Tensor:
        run = Run(x_BCTHW.device) if run is None else run
        return self.quant_conv(self.encoder(Clip([x_BCTHW]), run).joined())

    def _decode(self, z_BCthw: Tensor, run: Run | None = None) -> Tensor:
        run = Run(z_BCthw.device) if run is None else run
        return self.decoder(Clip([self.post_quant_conv(z_BCthw)]), run).joined()

    def _blended_tiles(self, direction: Direction, shape: Sequence[int], blend: Blend) -> BlendedTiles:
        time, space = self.arch.temporal_compression_ratio, self.arch.spatial_compression_ratio
        blend.check(time, space)
        return blended_tiles(shape, blend.cut("frames", direction, time), blend.cut("pixels", direction, space))

    def _formulation(self, direction: Direction, dtype: torch.dtype) -> tuple[str, ...]:
        return formulation(self.device, dtype)

    def _execute(self, plan: Plan, x: Tensor, units: Units) -> Tensor:
        if not plan.in_steps:
            return super()._execute(plan, x, units)
        run = Run(plan.device, self._most_numbers(plan))
        steps = self.encode_steps(run) if plan.direction == "encode" else self.decode_steps(run)
        return self._run_steps(plan, steps, x, units)

    def _steps_know(self, plan: Plan) -> Hashable:
        return self._most_numbers(plan)

    def _at_once(self, plan: Plan, x: Tensor, units: Units) -> Tensor:
        half = self.encoder if plan.direction == "encode" else self.decoder
        units.begin(sum(isinstance(layer, CausalConv) for layer in half.modules()))
        run = Run(plan.device, self._most_numbers(plan), units.done)
        return self._encode(x, run) if plan.direction == "encode" else self._decode(x, run)

    def _most_numbers(self, plan: Plan) -> int | None:
        """What a convolution takes at a time; None: everything."""
        latents = (plan.output_shape if plan.direction == "encode" else plan.input_shape)[2]
        numbers = None
        if plan.chunk is not None and plan.chunk < latents:
            numbers = self._numbers(plan.direction, plan.input_shape, plan.chunk)
        if plan.tile is not None and plan.device.type != "cpu":
            # Tiles are there to save memory.
            most = (_SLAB_BYTES if plan.places else _TILE_BYTES) // plan.dtype.itemsize
            numbers = min(numbers or most, most)
        return numbers

    def _chunk(
        self, direction: Direction, shape: Sequence[int], output: Sequence[int], asked: int | None
    ) -> int | None:
        """Latent frames whose finest grid a convolution takes at a time; None where there is one."""
        if asked is not None and asked < 1:
            raise ConfigError(f"a piece needs at least one latent frame, got chunk={asked}")
        latents = (output if direction == "encode" else shape)[2]
        if latents == 1:
            return None
        if asked is None and self.device.type == "cpu":
            # Where pieces save memory too, but cost time.
            return latents
        latent_bytes = self._numbers(direction, shape, 1) * self._half_dtype(direction).itemsize
        return min(max(_PIECE_BYTES // latent_bytes, 1) if asked is None else asked, latents)

    def _numbers(self, direction: Direction, shape: Sequence[int], chunk: int) -> int:
        """How many numbers the finest grid has for that many latent frames, where it is widest."""
        ratio = 1 if direction == "encode" else self.arch.spatial_compression_ratio
        height, width = (size * ratio for size in shape[3:])
        widest = max(self.arch.block_out_channels[:2])
        return chunk * self.arch.temporal_compression_ratio * height * width * widest


def _arch(config: VAEConfig) -> HunyuanVideoArchConfig:
    assert isinstance(config.arch_config, HunyuanVideoArchConfig)
    return config.arch_config


# Bytes of what a convolution takes at a time: larger pieces gain nothing in speed.
_PIECE_BYTES = 1 << 30
# The same in a tile, where it is enough to keep a GPU busy.
_TILE_BYTES = 1 << 27
# The same in a slab: 32 rows of 33 frames come in one piece then, and need not be joined.
_SLAB_BYTES = 3 << 27
