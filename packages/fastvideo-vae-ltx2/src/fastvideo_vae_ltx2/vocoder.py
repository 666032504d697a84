"""The vocoders of LTX-2: from log-mel spectrograms to waveforms.

Shape legend: B batch, C channels, T frames, M mel bins, S samples; N channels of a layer.
Source: Lightricks/LTX-2 `ltx_core/model/audio_vae/vocoder.py`, after HiFi-GAN and BigVGAN. Names are diffusers'.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import ConfigError, ShapeError
from fastvideo_vae_core.ops import between
from fastvideo_vae_core.ops.between import even_leaky
from fastvideo_vae_core.ops.conv1d import arrange, conv1d, dilated1d, even1d, evened, needs, room, upsample1d
from fastvideo_vae_core.ops.modules import Modules
from fastvideo_vae_core.ops.sums import Sum
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.tiling import Axis, Step, slide
from fastvideo_vae_core.units import Progress
from fastvideo_vae_core.vae import ParallelTiledVAE
from fastvideo_vae_ltx2.config import Generator as GeneratorConfig
from fastvideo_vae_ltx2.config import LTX2VocoderArchConfig
from fastvideo_vae_ltx2.mel import FLOOR

# Frames of a piece where sound is computed in pieces: 10 s.
_PIECE = 1024


class LTX2Vocoder(ParallelTiledVAE[None]):
    """Log-mel spectrograms to waveforms in [-1, 1]; there is no way back, so nothing encodes.

    (B, 2, T, 64) -> (B, 2, 240 T) at 24 kHz (LTX-2.0), or (B, 2, 480 T) at 48 kHz (LTX-2.3, with bandwidth extension).
    For example (1, 2, 501, 64), 5 s, -> (1, 2, 240480). Calling the model gives the waveform.

    With bandwidth extension 16-bit weights are computed in float32, as officially: in bfloat16 the sound is measurably
    worse. `VAEConfig(fp16="off")` computes in the type of the weights. The first stage is clamped to [-1, 1] before
    its bandwidth is extended, as officially.

    Nothing reaches further than some frames, so sound of any length is computed in pieces with the same numbers as at
    once. That happens by itself above 2048 frames.

    Raises:
        ShapeError: channels or mel bins do not fit.
        ConfigError: something is to be encoded, or tiles in height and width are asked for.
    """

    family = "ltx2"
    component = "vocoder"
    encoder_modules = ()
    # Of the one generator, or of the parts that there are with bandwidth extension.
    decoder_modules = (
        "conv_in",
        "upsamplers",
        "resnets",
        "act_out",
        "conv_out",
        "vocoder",
        "bwe_generator",
        "mel_stft",
    )
    sample_layout = "(B, C, S)"
    padding_mode = "constant"

    def __init__(self, config: VAEConfig) -> None:
        if not config.load_decoder:
            raise ConfigError(_NO_ENCODER)
        super().__init__(replace(config, load_encoder=False))
        arch = self.arch = _arch(config)
        if config.use_tiling:
            raise ConfigError(_NO_TILES)
        # The parts of the network are the model's own, by their names; the tuple keeps the whole from being one, too.
        network: Extended | Generator = (
            Extended(arch) if arch.extension else Generator(arch.generator, arch.final_act_fn)
        )
        for name, part in network.named_children():
            self.add_module(name, part)
        self._network = (network,)

    @property
    def sample_axes(self) -> tuple[Axis, ...]:
        return (Axis(up=self.arch.hop),)

    @property
    def channels(self) -> tuple[int, int]:
        return self.arch.out_channels, self.arch.in_channels

    @property
    def sampling_rate(self) -> int:
        """Of the waveforms, in Hz."""
        return self.arch.output_sampling_rate

    @property
    def hop_length(self) -> int:
        """Samples of a frame."""
        return self.arch.hop

    def forward(self, mel_BCTM: Tensor) -> Tensor:
        """The waveforms of spectrograms."""
        return self.decode(mel_BCTM).sample

    def decoded_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the waveforms of spectrograms of that shape."""
        return super().decoded_shape(self._flat_shape(shape))

    def posterior(self, parameters: Tensor) -> NoReturn:
        raise ConfigError(_NO_ENCODER)

    def normalize_latents(self, z: Tensor) -> Tensor:
        """Spectrograms as they are: they have no other scale."""
        return z

    def denormalize_latents(self, z: Tensor) -> Tensor:
        """Spectrograms as they are."""
        return z

    def enable_tiling(
        self, tile_sample_min_height: int | None = None, tile_sample_min_width: int | None = None
    ) -> None:
        raise ConfigError(_NO_TILES)

    def encode_steps(self) -> NoReturn:
        raise ConfigError(_NO_ENCODER)

    def decode_steps(self) -> list[Step]:
        """The whole network, with the frames around it that it needs."""
        return [Step(name="vocoder", run=lambda grids, _: self._decode(grids[0]), axes=(self._axis(),))]

    def _encode(self, x: Tensor) -> NoReturn:
        raise ConfigError(_NO_ENCODER)

    def _decode(self, x_BNT: Tensor) -> Tensor:
        return self._network[0](x_BNT)

    def _axis(self) -> Axis:
        hop, reach = self.arch.hop, self._network[0].needs
        return Axis(up=hop, before=-reach(0, 0)[0], after=reach(hop - 1, hop - 1)[1])

    def _run(self, direction: Direction, x: Tensor, plan: Plan | None, progress: Progress | None = None) -> Tensor:
        next(self._half_parameters(direction))  # refuses to encode
        return super()._run(direction, x, plan, progress)

    def _as_planned(self, x: Tensor) -> Tensor:
        """(B, C, T, M) -> (B, C * M, T), as the first convolution takes it; what is flat stays."""
        self._flat_shape(x.shape)
        return x.transpose(2, 3).flatten(1, 2) if x.ndim == 4 else x

    def _plan(
        self,
        direction: Direction,
        shape: tuple[int, ...],
        memory_budget: int | str | None = None,
        tile: Sequence[int] | None = None,
        items: int | None = None,
        chunk: int | None = None,
    ) -> Plan:
        next(self._half_parameters(direction))  # refuses to encode
        shape = self._flat_shape(shape)
        if tile is None and shape[2] > 2 * _PIECE:
            tile = (_PIECE * self.arch.hop,)
        return super()._plan(direction, shape, memory_budget, tile, items, chunk)

    def _fp16(self, stored: torch.dtype) -> tuple[torch.dtype, bool, tuple[str, ...]]:
        if self.arch.extension is None or stored not in (torch.float16, torch.bfloat16):
            return super()._fp16(stored)
        if self.config.fp16 == "off":
            return stored, False, ()
        return torch.float32, False, ("16-bit weights computed in float32, as officially; fp16='off' does not",)

    def _configured_tile(self, shape: Sequence[int], output: Sequence[int]) -> tuple[int, ...] | None:
        if self.config.use_tiling:
            raise ConfigError(_NO_TILES)
        return None

    def _budget_tiles(self, direction: Direction, shape: Sequence[int], output: Sequence[int]) -> list[tuple[int, ...]]:
        lengths = ((_PIECE >> halvings) * self.arch.hop for halvings in range(_PIECE.bit_length()))
        return [(length,) for length in lengths if length < output[2]]

    def _stream(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Pieces along time, each as soon as everything that it depends on has come; of at most 1024 frames.

        A piece is computed with its context around it, so feed some hundred frames at a time unless latency matters.
        """
        next(self._half_parameters(direction))  # refuses to encode
        flat = self._checked(self._as_planned(chunk) for chunk in chunks)
        return slide(self._axis(), flat, lambda crop: self._run(direction, crop, None), _PIECE * self.arch.hop)

    def _checked(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        batch = 0
        for chunk in chunks:
            self._check_layout("decode", chunk.shape)
            batch = batch or len(chunk)
            if len(chunk) != batch:
                raise ShapeError(f"all chunks of a stream need the same batch, got {batch} and then {len(chunk)}")
            yield chunk

    def _flat_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        sound, inputs = self.arch.out_channels, self.arch.in_channels
        if len(shape) == 4 and tuple(shape[1::2]) == (sound, inputs // sound):
            return (shape[0], inputs, shape[2])
        if len(shape) == 3 and shape[1] == inputs:
            return tuple(shape)
        raise ShapeError(f"a vocoder takes spectrograms (B, {sound}, T, {inputs // sound}), got {tuple(shape)}")

    def _half_parameters(self, direction: Direction) -> Iterator[nn.Parameter]:
        if direction == "encode":
            raise ConfigError(_NO_ENCODER)
        return self.parameters()


class Extended(nn.Module):
    """A generator, and a second one that adds the frequencies above the first one's."""

    def __init__(self, arch: LTX2VocoderArchConfig) -> None:
        super().__init__()
        assert arch.extension is not None
        assert arch.input_sampling_rate is not None
        self.vocoder = Generator(arch.generator, arch.final_act_fn or "clamp")
        self.bwe_generator = Generator(arch.extension, None)
        self.mel_stft = MelSTFT(arch)
        self.ratio = arch.output_sampling_rate // arch.input_sampling_rate

    def forward(self, x_BNT: Tensor) -> Tensor:
        low_BCS = self.vocoder(x_BNT)
        added = self.bwe_generator(self.mel_stft(low_BCS))
        return (added + resampled(low_BCS, self.ratio)).clamp(-1.0, 1.0)

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """The frames [a, b] that the samples [first, last] are made from."""
        a, b = self.bwe_generator.needs(first, last)
        hop, window = self.mel_stft.hop, self.mel_stft.window
        width = _sinc_width()
        spectrum = a * hop + hop - window, b * hop + hop - 1
        skip = first // self.ratio - width, last // self.ratio + width
        return self.vocoder.needs(min(spectrum[0], skip[0]), max(spectrum[1], skip[1]))


class Generator(nn.Module):
    """(B, N, T) -> (B, C, S): each stage makes more samples, and averages residual blocks of several kernels."""

    def __init__(self, config: GeneratorConfig, final: Literal["tanh", "clamp"] | None) -> None:
        super().__init__()
        snakes, width = config.act_fn == "snakebeta", config.hidden_channels
        self.conv_in = nn.Conv1d(config.in_channels, width, 7, padding=3)
        self.upsamplers = Modules[nn.ConvTranspose1d]()
        self.resnets = Modules[ResidualBlock]()
        for kernel, factor in zip(config.kernel_sizes, config.factors, strict=True):
            self.upsamplers.append(
                nn.ConvTranspose1d(width, width // 2, kernel, factor, padding=(kernel - factor) // 2)
            )
            width //= 2
            self.resnets.extend(
                ResidualBlock(width, kernel, dilations, config)
                for kernel, dilations in zip(config.resnet_kernel_sizes, config.resnet_dilations, strict=True)
            )
        # The official code gives the last one its own slope, which is PyTorch's default.
        self.act_out = Snake(width) if snakes else LeakyReLU(0.01)
        self.conv_out = nn.Conv1d(width, config.out_channels, 7, padding=3, bias=config.final_bias)
        self.act = Activation() if snakes else LeakyReLU(config.slope)
        self.branches = len(config.resnet_kernel_sizes)
        # LeakyReLU has no parameters, so all branches of a stage begin with the same one.
        self.shares = not snakes and len({dilations[:1] for dilations in config.resnet_dilations}) == 1
        self.slope, self.dilations = config.slope, set(itertools.chain(*config.resnet_dilations))
        # Whether all of them do alike what a launch can do for all of them. Multiples of many dilations are long.
        counts = {len(dilations) for dilations in config.resnet_dilations}
        self.even = self.shares and self.branches == 3 and len(counts) == 1 and math.lcm(*self.dilations) <= _MOST_ZEROS
        self.final = _FINAL[final]

    def forward(self, x: Tensor) -> Tensor:
        parts = [conv1d(arrange(x), self.conv_in)]
        if self.even and between.fuses(parts[0].x, *(self.parameters() if torch.is_grad_enabled() else ())):
            return self.final(self._evenly(parts)).contiguous()
        for stage in range(len(self.upsamplers)):
            parts = self._branched(stage, _only(self.act, parts))
        return self.final(conv1d(_only(self.act_out, parts), self.conv_out).value()).contiguous()

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """The frames [a, b] that the samples [first, last] are made from."""
        first, last = self.act_out.needs(*needs(self.conv_out, first, last))
        for stage in reversed(range(len(self.upsamplers))):
            ranges = [branch.needs(first, last) for branch in self._branches(stage)]
            first, last = needs(self.upsamplers[stage], min(a for a, _ in ranges), max(b for _, b in ranges))
        return needs(self.conv_in, first, last)

    def _branched(self, stage: int, x: Tensor) -> list[Sum]:
        """What the branches of a stage make, whose mean is left to whoever takes it."""
        first, *others = self._branches(stage)
        x, y = first.begun(upsample1d(x, self.upsamplers[stage]))
        parts = [first(x, y)]
        for branch in others:
            if not self.shares:
                _, y = branch.begun(Sum(x))
            parts.append(branch(x, y))
        return parts

    def _evenly(self, parts: list[Sum]) -> Tensor:
        """All that is behind the first convolution, on a GPU with LeakyReLU: what the branches of a stage do alike is
        done in one launch, and all signals of a stage have the same length in memory."""
        samples = even = parts[0].x.shape[2]
        for stage, upsampler in enumerate(self.upsamplers):
            y = _first(even_leaky(parts, self.slope, samples=samples, even=even, mean=True))
            parts = [upsample1d(y, upsampler, samples)]
            del y
            samples = parts[0].x.shape[2]
            even = evened(parts[0].x, samples, self.dilations)
            parts = self._even_branches(stage, parts, samples, even)
        assert isinstance(self.act_out, LeakyReLU)
        y = _first(even_leaky(parts, self.act_out.slope, samples=samples, even=even, mean=True))
        parts.clear()
        made, _, bias = even1d(y, self.conv_out)
        return Sum(made.flatten(2)[:, :, :samples], bias=bias).value()

    def _even_branches(self, stage: int, parts: list[Sum], samples: int, even: int) -> list[Sum]:
        """`_branched` of what is upsampled."""
        (x,), (y,) = even_leaky(parts, self.slope, samples=samples, even=even, keep=True)
        xs, ys = [x] * self.branches, [y] * self.branches
        del x, y
        steps = zip(*(zip(each.convs1, each.convs2, strict=True) for each in self._branches(stage)), strict=True)
        for index, convs in enumerate(steps):
            if index:
                xs, ys = even_leaky(parts, self.slope, samples=samples, even=even, keep=True)
            # What nobody needs any more is dropped at once: the next one takes its memory.
            parts[:] = [even1d(ys.pop(0), conv) for conv, _ in convs]
            _, ys = even_leaky(parts, self.slope, samples=samples, even=even)
            parts[:] = [even1d(ys.pop(0), conv)._replace(branch=x) for (_, conv), x in zip(convs, xs, strict=True)]
            xs.clear()
        return parts

    def _branches(self, stage: int) -> list[ResidualBlock]:
        return list(self.resnets)[stage * self.branches : (stage + 1) * self.branches]


class ResidualBlock(nn.Module):
    """Activation, dilated convolution, activation, convolution, each added to the input, for every dilation."""

    def __init__(self, width: int, kernel: int, dilations: Sequence[int], config: GeneratorConfig) -> None:
        super().__init__()
        snakes = config.act_fn == "snakebeta"

        def conv(dilation: int) -> nn.Conv1d:
            return nn.Conv1d(width, width, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2)

        def activation() -> Activation:
            return Snake(width) if snakes else LeakyReLU(config.slope)

        self.convs1 = Modules[nn.Conv1d](conv(dilation) for dilation in dilations)
        self.convs2 = Modules[nn.Conv1d](conv(1) for _ in dilations)
        self.acts1 = Modules[Activation](activation() for _ in dilations)
        self.acts2 = Modules[Activation](activation() for _ in dilations)

    def forward(self, x: Tensor, y: Tensor) -> Sum:
        """Of x (B, N, S), and y, which `begun` made of it; the last sum is left to whoever takes it."""
        following = itertools.chain(itertools.islice(zip(self.acts1, self.convs1, strict=True), 1, None), [None])
        # What nobody needs any more is dropped at once: the next one takes its memory.
        held, parts = [y], []
        del y
        for conv1, conv2, act2, then in zip(self.convs1, self.convs2, self.acts2, following, strict=True):
            samples = x.shape[2]
            held[0] = act2([dilated1d(held[0], conv1, samples)], conv2)[1]
            parts = [dilated1d(held.pop(), conv2, samples)._replace(branch=x)]
            if then is not None:
                x, activated = _kept(*then[0](parts, then[1], keep=True))
                held.append(activated)
                del activated
                parts.clear()
        return parts[0]

    def begun(self, x: Sum) -> tuple[Tensor, Tensor]:
        """The sum, and the first activation of it."""
        return _kept(*next(iter(self.acts1))([x], next(iter(self.convs1)), keep=True))

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """The inputs [a, b] that the outputs [first, last] are made from."""
        for conv1, conv2, act1, act2 in zip(self.convs1, self.convs2, self.acts1, self.acts2, strict=True):
            first, last = act2.needs(*needs(conv2, first, last))
            first, last = act1.needs(*needs(conv1, first, last))
        return first, last


class Activation(nn.Module):
    """An activation of the mean of sums (B, N, S), with room for the convolution behind it, and behind the mean itself
    if that is to be kept; this one is the mean."""

    def forward(
        self, parts: Sequence[Sum], conv: nn.Conv1d | None = None, keep: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        return between.leaky(parts, 1.0, _room(parts, conv), keep)

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """The inputs [a, b] that the outputs [first, last] are made from."""
        return first, last


class LeakyReLU(Activation):
    """x where it is positive, and x times the slope elsewhere."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(
        self, parts: Sequence[Sum], conv: nn.Conv1d | None = None, keep: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        return between.leaky(parts, self.slope, _room(parts, conv), keep)


class Snake(Activation):
    """Snake at twice the sampling rate, between filters against aliasing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.act = SnakeParameters(width)
        self.upsample = Filter()
        self.downsample = Filter()

    def forward(
        self, parts: Sequence[Sum], conv: nn.Conv1d | None = None, keep: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        x = parts[0] if len(parts) == 1 else Sum(between.leaky(parts, 1.0)[1])
        filters = self.upsample.filter, self.downsample.filter
        return between.antialiased_snake(x, self.act.alpha, self.act.beta, *filters, _room(parts, conv), keep)

    def needs(self, first: int, last: int) -> tuple[int, int]:
        # Half the taps at twice the rate, and again on the way there.
        return first - between.TAPS // 2, last + between.TAPS // 2


class SnakeParameters(nn.Module):
    """The logarithms alpha and beta of each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.beta = nn.Parameter(torch.zeros(width))


class Filter(nn.Module):
    """A low-pass filter, as it stands in the checkpoint."""

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.zeros(1, 1, between.TAPS))


class MelSTFT(nn.Module):
    """Waveforms (B, C, S) to spectrograms (B, C * M, T) that see no later samples; bases stand in the checkpoint."""

    mel_basis: Tensor

    def __init__(self, arch: LTX2VocoderArchConfig) -> None:
        super().__init__()
        assert arch.filter_length is not None
        assert arch.hop_length is not None
        assert arch.num_mel_channels is not None
        self.window, self.hop = arch.filter_length, arch.hop_length
        self.register_buffer("mel_basis", torch.zeros(arch.num_mel_channels, self.window // 2 + 1))
        self.stft_fn = FourierBasis(self.window)

    def forward(self, x_BCS: Tensor) -> Tensor:
        padded = F.pad(x_BCS.flatten(0, 1).unsqueeze(1), (self.window - self.hop, 0))
        real, imaginary = F.conv1d(padded, self.stft_fn.forward_basis, stride=self.hop).chunk(2, 1)
        mel = self.mel_basis @ (real.square() + imaginary.square()).sqrt()
        return mel.clamp(min=FLOOR).log().unflatten(0, x_BCS.shape[:2]).flatten(1, 2)


class FourierBasis(nn.Module):
    """Windowed cosines and sines of all frequencies."""

    forward_basis: Tensor

    def __init__(self, window: int) -> None:
        super().__init__()
        self.register_buffer("forward_basis", torch.zeros(window + 2, 1, window))


def _room(parts: Sequence[Sum], conv: nn.Conv1d | None) -> int:
    """How many zeros behind its input that convolution is glad of."""
    return 0 if conv is None else room(parts[0].x, conv)


def _only(act: Activation, parts: list[Sum]) -> Tensor:
    """The activation of the mean of sums, which are dropped."""
    y = act(parts)[1]
    parts.clear()
    return y


def _first(made: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    """The activation of a mean."""
    return made[1][0]


def _kept(total: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
    assert total is not None
    return total, y


def resampled(x_BCS: Tensor, ratio: int) -> Tensor:
    """`ratio` times as many samples, by a windowed sinc, which is in no checkpoint."""
    width = _sinc_width()
    taps = _sinc(ratio).to(x_BCS).expand(x_BCS.shape[1], 1, -1)
    padded = F.pad(x_BCS, (width, width), mode="replicate")
    y = ratio * F.conv_transpose1d(padded, taps, stride=ratio, groups=x_BCS.shape[1])
    return y[..., 2 * width * ratio :][..., : x_BCS.shape[2] * ratio]


@cache
def _sinc(ratio: int) -> Tensor:
    """The filter in float32 on the CPU."""
    with torch.device("cpu"):
        time = (torch.arange(2 * _sinc_width() * ratio + 1) / ratio - _sinc_width()) * _ROLLOFF
        window = torch.cos(time.clamp(-_ZEROS, _ZEROS) * math.pi / _ZEROS / 2).square()
        return torch.sinc(time) * window * _ROLLOFF / ratio


def _sinc_width() -> int:
    return math.ceil(_ZEROS / _ROLLOFF)


def _arch(config: VAEConfig) -> LTX2VocoderArchConfig:
    assert isinstance(config.arch_config, LTX2VocoderArchConfig)
    return config.arch_config


_FINAL: dict[str | None, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "clamp": lambda x: x.clamp(-1.0, 1.0),
    None: lambda x: x,
}

# The most zeros behind a signal that make its length one for all dilations.
_MOST_ZEROS = 64

# Zero crossings and bandwidth of the sinc.
_ZEROS = 6
_ROLLOFF = 0.99

_NO_ENCODER = "a vocoder has a decoder only: it makes waveforms of spectrograms; AutoencoderKLLTX2Audio encodes"
_NO_TILES = (
    "tiles in height and width are for pictures; sound is computed in pieces along time by itself: leave use_tiling"
    " off, or pass tile=(samples,) to plan_decode"
)
