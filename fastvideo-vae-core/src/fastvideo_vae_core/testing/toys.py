"""Complete miniature families of each kind of media: what core is tested with, and the shortest examples of a family.

Shape legend: B batch, C channels; upper case T, H, W, S the sample grid, lower case t, h, w, s the latent grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core import registry
from fastvideo_vae_core.config import VAEArchConfig, VAEConfig, bounded
from fastvideo_vae_core.distribution import DiagonalGaussianDistribution
from fastvideo_vae_core.errors import ShapeError
from fastvideo_vae_core.family import Component, Evidence, Family, Inferred, Layout, Media
from fastvideo_vae_core.latents import scale_latents, unscale_latents
from fastvideo_vae_core.ops.attention import GridAttention
from fastvideo_vae_core.ops.norm import Moments, group_norm_act
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing.golden import fill
from fastvideo_vae_core.tiling import POINTWISE, WHOLE, Axis, Step
from fastvideo_vae_core.vae import ParallelTiledVAE


@dataclass(frozen=True, kw_only=True)
class ToyArchConfig(VAEArchConfig):
    """Facts of a toy: width of its layers, channels of its latents, and their scale."""

    width: int = bounded(8, 2, 64)
    latent_channels: int = bounded(4, 1, 64)
    scaling_factor: float = bounded(0.5, 1e-6, 1e6)


class Half(nn.Module, ABC):
    """An encoder or a decoder."""

    @abstractmethod
    def steps(self) -> Sequence[Step]:
        """The half in pieces that can be run tile by tile."""


class Toy(ParallelTiledVAE[DiagonalGaussianDistribution]):
    """What the toys share: two channels of samples, and latents that are scaled."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        assert isinstance(config.arch_config, ToyArchConfig)
        self.arch = config.arch_config
        sizes = (self.arch.width, self.arch.latent_channels)
        if config.load_encoder:
            self.encoder = self.encoder_of(*sizes)
        if config.load_decoder:
            self.decoder = self.decoder_of(*sizes)

    @abstractmethod
    def encoder_of(self, width: int, latents: int) -> Half:
        """The encoder, with the initial weights of its layers."""

    @abstractmethod
    def decoder_of(self, width: int, latents: int) -> Half:
        """The decoder, likewise."""

    @property
    def channels(self) -> tuple[int, int]:
        return 2, self.arch.latent_channels

    def posterior(self, parameters: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(parameters)

    def normalize_latents(self, z: Tensor) -> Tensor:
        return scale_latents(z, self.arch.scaling_factor)

    def denormalize_latents(self, z: Tensor) -> Tensor:
        return unscale_latents(z, self.arch.scaling_factor)

    def encode_steps(self) -> Sequence[Step]:
        return self.encoder.steps()

    def decode_steps(self) -> Sequence[Step]:
        return self.decoder.steps()

    def _encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def _decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def _configured_tile(self, shape: Sequence[int], output: Sequence[int]) -> tuple[int, ...] | None:
        return (4,) * len(self.sample_axes) if self.config.use_tiling else None


# -------------------------------------------------------------------- image: group norms over the picture, attention


class ToyImage(Toy):
    """(B, 2, 2h, 2w) <-> (B, z, h, w)."""

    family = "toy_image"
    sample_layout = "(B, C, H, W)"

    @property
    def sample_axes(self) -> tuple[Axis, ...]:
        return (Axis(up=2),) * 2

    def encoder_of(self, width: int, latents: int) -> Half:
        return ImageEncoder(width, latents)

    def decoder_of(self, width: int, latents: int) -> Half:
        return ImageDecoder(width, latents)


class ImageEncoder(Half):
    """Strided convolution behind zeros at right and below, residual block, attention."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2, width, 3, stride=2)
        self.block = ImageBlock(width)
        self.attention = GridAttention(width, 2)
        self.norm_out = nn.GroupNorm(2, width)
        self.conv_out = nn.Conv2d(width, 2 * latents, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self._tail(self.attention(self.block(self._head(x))), None)

    def steps(self) -> Sequence[Step]:
        return [
            Step(name="conv_in", run=lambda grids, _: self._head(grids[0]), axes=(Axis(down=2, after=1),) * 2),
            *self.block.steps(),
            Step(name="attention", run=lambda grids, _: self.attention(grids[0]), axes=(WHOLE,) * 2),
            Step(
                name="conv_out",
                run=lambda grids, moments: self._tail(grids[0], moments),
                axes=_CONV,
                norm=self.norm_out,
            ),
        ]

    def _head(self, x: Tensor) -> Tensor:
        return self.conv_in(F.pad(x, (0, 1, 0, 1)))

    def _tail(self, x: Tensor, moments: Moments | None) -> Tensor:
        return self.conv_out(group_norm_act(x, self.norm_out, F.silu, moments))


class ImageDecoder(Half):
    """Residual block, nearest neighbour and convolution."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latents, width, 3, padding=1)
        self.block = ImageBlock(width)
        self.conv_out = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self._tail(self.block(self.conv_in(z)))

    def steps(self) -> Sequence[Step]:
        return [
            Step(name="conv_in", run=lambda grids, _: self.conv_in(grids[0]), axes=_CONV),
            *self.block.steps(),
            Step(name="conv_out", run=lambda grids, _: self._tail(grids[0]), axes=(Axis(up=2, before=1, after=1),) * 2),
        ]

    def _tail(self, x: Tensor) -> Tensor:
        return self.conv_out(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ImageBlock(nn.Module):
    """Norm, activation, convolution, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.conv = nn.Conv2d(width, width, 5, padding=2)

    def forward(self, x: Tensor, moments: Moments | None = None) -> Tensor:
        return self.conv(group_norm_act(x, self.norm, F.silu, moments)) + x

    def steps(self) -> Sequence[Step]:
        axes = (Axis(before=2, after=2),) * 2
        return [Step(name="block", run=lambda grids, moments: self(grids[0], moments), axes=axes, norm=self.norm)]


# -------------------------------------------------------------------- video: causal in time, so that it streams

# Frames that a layer has seen and still needs, by layer. The call that streams owns it.
Past = dict[nn.Module, Tensor]


class ToyVideo(Toy):
    """(B, 2, 2t - 1, 2h, 2w) <-> (B, z, t, h, w); the first frame is a latent frame of its own."""

    family = "toy_video"
    sample_layout = "(B, C, T, H, W)"

    @property
    def sample_axes(self) -> tuple[Axis, ...]:
        return Axis(up=2, lead=1), Axis(up=2), Axis(up=2)

    def encoder_of(self, width: int, latents: int) -> Half:
        return VideoEncoder(width, latents)

    def decoder_of(self, width: int, latents: int) -> Half:
        return VideoDecoder(width, latents)

    def _stream(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        half, past = self.encoder if direction == "encode" else self.decoder, Past()
        dtype, frames = self._half_dtype(direction), 2 if direction == "encode" else 1
        for piece in _regroup(chunks, 1, frames):
            yield half(piece.to(dtype), past)


class VideoEncoder(Half):
    """Causal convolution, half the frames, half the picture."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.conv_in = CausalConv(2, width)
        self.time_down = TimeDown(width)
        self.attention = FrameAttention(width)
        self.conv_out = nn.Conv3d(width, 2 * latents, (1, 3, 3), stride=(1, 2, 2))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return self._tail(self.attention(self.time_down(F.silu(self.conv_in(x, past)), past)))

    def steps(self) -> Sequence[Step]:
        down = (Axis(down=2, lead=1, before=1), POINTWISE, POINTWISE)
        return [
            Step(name="conv_in", run=lambda grids, _: F.silu(self.conv_in(grids[0])), axes=_CAUSAL),
            Step(name="time_down", run=lambda grids, _: self.time_down(grids[0]), axes=down),
            Step(name="attention", run=lambda grids, _: self.attention(grids[0]), axes=(POINTWISE, WHOLE, WHOLE)),
            Step(
                name="conv_out",
                run=lambda grids, _: self._tail(grids[0]),
                axes=(POINTWISE, Axis(down=2, after=1), Axis(down=2, after=1)),
            ),
        ]

    def _tail(self, x: Tensor) -> Tensor:
        return self.conv_out(F.pad(x, (0, 1, 0, 1)))


class VideoDecoder(Half):
    """Causal convolution, twice the frames, twice the picture."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.conv_in = CausalConv(latents, width)
        self.time_up = TimeUp(width)
        self.conv_out = nn.Conv3d(width, 2, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, z: Tensor, past: Past | None = None) -> Tensor:
        return self._tail(self.time_up(F.silu(self.conv_in(z, past)), past))

    def steps(self) -> Sequence[Step]:
        up = (Axis(up=2, lead=1, before=2), POINTWISE, POINTWISE)
        return [
            Step(name="conv_in", run=lambda grids, _: F.silu(self.conv_in(grids[0])), axes=_CAUSAL),
            Step(name="time_up", run=lambda grids, _: self.time_up(grids[0]), axes=up),
            Step(
                name="conv_out",
                run=lambda grids, _: self._tail(grids[0]),
                axes=(POINTWISE, Axis(up=2, before=1, after=1), Axis(up=2, before=1, after=1)),
            ),
        ]

    def _tail(self, x: Tensor) -> Tensor:
        return self.conv_out(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))


class CausalConv(nn.Conv3d):
    """A convolution of 3 x 3 x 3 that sees two frames back and none ahead."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return super().forward(_behind(self, x, past, frames=2))


class TimeDown(nn.Module):
    """The first frame stays; every further two become one, which sees the frame before them too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        kept = x[:, :, : 0 if past is not None and self in past else 1]
        seen = x if past is None or self not in past else torch.cat([past[self], x], 2)
        if past is not None:
            past[self] = x[:, :, -1:]
        return torch.cat([kept, self.conv(seen)], 2) if seen.shape[2] > 2 else kept


class TimeUp(nn.Module):
    """The first frame stays, unseen by the others; every further one becomes two, and sees two frames back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, 2 * width, (3, 1, 1))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        kept = x[:, :, : 0 if past is not None and self in past else 1]
        rest = x[:, :, kept.shape[2] :]
        if past is not None and kept.shape[2]:
            past[self] = torch.zeros_like(kept).repeat(1, 1, 2, 1, 1)
        if not rest.shape[2]:
            return kept
        made = self.conv(_behind(self, rest, past, frames=2)).unflatten(1, (2, -1))
        return torch.cat([kept, made.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)


class FrameAttention(nn.Module):
    """Attention over the pixels of each frame, apart from the others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = GridAttention(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.inner(frame) for frame in x.unbind(2)], 2)


# -------------------------------------------------------------------- audio: strided and transposed convolutions


class ToyAudio(Toy):
    """(B, 2, 4s) <-> (B, z, s)."""

    family = "toy_audio"
    sample_layout = "(B, C, S)"
    padding_mode = "constant"

    @property
    def sample_axes(self) -> tuple[Axis, ...]:
        return (Axis(up=4),)

    def _budget_tiles(self, direction: Direction, shape: Sequence[int], output: Sequence[int]) -> list[tuple[int, ...]]:
        return [(length,) for length in (256, 64, 16)]

    def encoder_of(self, width: int, latents: int) -> Half:
        return AudioEncoder(width, latents)

    def decoder_of(self, width: int, latents: int) -> Half:
        return AudioDecoder(width, latents)


class AudioEncoder(Half):
    """Dilated convolution, then a quarter of the samples."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv1d(2, width, 7, padding=9, dilation=3)
        self.conv_out = nn.Conv1d(width, 2 * latents, 8, stride=4, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(torch.sin(self.conv_in(x)))

    def steps(self) -> Sequence[Step]:
        return [
            Step(
                name="conv_in",
                run=lambda grids, _: torch.sin(self.conv_in(grids[0])),
                axes=(Axis(before=9, after=9),),
            ),
            Step(
                name="conv_out",
                run=lambda grids, _: self.conv_out(grids[0]),
                axes=(Axis(down=4, before=2, after=2),),
            ),
        ]


class AudioDecoder(Half):
    """Four times the samples, then a dilated convolution."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.conv_in = nn.ConvTranspose1d(latents, width, 8, stride=4, padding=2)
        self.conv_out = nn.Conv1d(width, 2, 7, padding=9, dilation=3)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv_out(torch.sin(self.conv_in(z)))

    def steps(self) -> Sequence[Step]:
        return [
            Step(
                name="conv_in",
                run=lambda grids, _: torch.sin(self.conv_in(grids[0])),
                axes=(Axis(up=4, before=1, after=1),),
            ),
            Step(name="conv_out", run=lambda grids, _: self.conv_out(grids[0]), axes=(Axis(before=9, after=9),)),
        ]


# -------------------------------------------------------------------- as families


def toy(model: type[Toy], **settings: object) -> Toy:
    """A toy with weights; settings are those of VAEConfig.

    For example `toy(ToyVideo).decode(torch.zeros(1, 4, 3, 5, 7))` gives (1, 2, 5, 10, 14).
    """
    made = model(VAEConfig(arch_config=ToyArchConfig(), **settings))  # type: ignore[arg-type]
    fill(made)
    return made.eval()


def infer(evidence: Evidence) -> Inferred:
    """Width and latents of a toy, read off either half."""
    shapes = evidence.shapes
    if "encoder.conv_in.weight" in shapes:
        width, latents = shapes["encoder.conv_in.weight"][0], shapes["encoder.conv_out.weight"][0] // 2
    else:
        inner = shapes["decoder.conv_in.weight"]
        # A transposed convolution has its input channels first.
        width, latents = shapes["decoder.conv_out.weight"][1], inner[0] if len(inner) == 3 else inner[1]
    return Inferred(arch=ToyArchConfig(width=width, latent_channels=latents))


def _behind(layer: nn.Module, x: Tensor, past: Past | None, frames: int) -> Tensor:
    """x behind the frames that the layer saw last, or behind zeros."""
    before = None if past is None else past.get(layer)
    if before is None:
        before = x.new_zeros((*x.shape[:2], frames, *x.shape[3:]))
    seen = torch.cat([before, x], 2)
    if past is not None:
        past[layer] = seen[:, :, -frames:]
    return seen


def _regroup(chunks: Iterable[Tensor], first: int, then: int) -> Iterator[Tensor]:
    """Frames in pieces of the lengths that a causal network takes, however they come."""
    held: Tensor | None = None
    wanted = first
    for chunk in chunks:
        held = chunk if held is None else torch.cat([held, chunk], 2)
        while held.shape[2] >= wanted:
            yield held[:, :, :wanted]
            held, wanted = held[:, :, wanted:], then
    if held is not None and held.shape[2]:
        raise ShapeError(f"{held.shape[2]} frames are left over; a stream takes {first} and then multiples of {then}")


def _family(media: Media, axes: int) -> Family:
    component = Component(
        media=media,
        model=f"{__name__}:Toy{media.capitalize()}",
        arch=f"{__name__}:ToyArchConfig",
        class_names=(f"Toy{media.capitalize()}",),
        variants={},
        layouts=(
            Layout(name="diffusers", markers=(("encoder.conv_in.weight", axes), ("decoder.conv_out.weight", axes))),
        ),
        infer=f"{__name__}:infer",
    )
    return Family(
        name=f"toy_{media}", distribution="fastvideo-vae-core", title=f"{media}: a toy", components=(component,)
    )


_CONV = (Axis(before=1, after=1),) * 2
_CAUSAL = (Axis(before=2), Axis(before=1, after=1), Axis(before=1, after=1))

IMAGE, VIDEO, AUDIO = _family("image", 4), _family("video", 5), _family("audio", 3)
# What an installed distribution with these families would declare.
POINTS = tuple(
    EntryPoint(name=f"toy_{media}", group=registry.GROUP, value=f"{__name__}:{media.upper()}")
    for media in ("image", "video", "audio")
)
