"""The audio autoencoder of LTX-2 over waveforms: behind its spectrograms, and before a vocoder.

Shape legend: B batch, C channels, S samples; T frames, M mel bins of a spectrogram; t, m latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

from torch import Tensor

from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.distribution import DiagonalGaussianDistribution
from fastvideo_vae_core.errors import ConfigError, ShapeError
from fastvideo_vae_core.memory import Forecast, parse_bytes
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_core.tiling import Axis, Step, slide
from fastvideo_vae_core.units import Progress
from fastvideo_vae_core.vae import ParallelTiledVAE
from fastvideo_vae_ltx2.audio import AutoencoderKLLTX2Audio
from fastvideo_vae_ltx2.mel import WINDOW
from fastvideo_vae_ltx2.vocoder import LTX2Vocoder

# Frames of a piece of a spectrogram: 20 s.
_PIECE = 2048
# A spectrogram reflects more samples than one latent stands for.
_LEAST_LATENTS = 2


class _OverWaveforms(ParallelTiledVAE[DiagonalGaussianDistribution]):
    """What both directions share. `hop` samples are a frame, so `ratio * hop` samples are a latent, but for the first
    latent, which is of one frame. Latents are those of the audio autoencoder, (B, 8, t, 16)."""

    family = "ltx2"
    component = "audio"
    sample_layout = "(B, C, S)"
    padding_mode = "constant"
    sampling_rate: int
    hop: int

    def __init__(self, audio: AutoencoderKLLTX2Audio, config: VAEConfig) -> None:
        super().__init__(config)
        self.audio = audio
        self._provenance = audio.provenance

    @property
    def sample_axes(self) -> tuple[Axis, ...]:
        ratio = self.audio.arch.ratio
        return (Axis(up=ratio * self.hop, lead=(ratio - 1) * self.hop),)

    @property
    def channels(self) -> tuple[int, int]:
        return self.audio.channels

    def valid_sample_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        least = self.sample_axes[0].output_size(_LEAST_LATENTS)
        return super().valid_sample_shape((*shape[:2], max(shape[2], least)))

    def encoded_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*super().encoded_shape(shape), self.audio.arch.mel_bins // self.audio.arch.ratio)

    def decoded_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        batch, _, frames, _ = self.audio.decoded_shape(shape)
        return (batch, self.channels[0], frames * self.hop)

    def posterior(self, parameters: Tensor) -> DiagonalGaussianDistribution:
        return self.audio.posterior(parameters)

    def normalize_latents(self, z: Tensor) -> Tensor:
        return self.audio.normalize_latents(z)

    def denormalize_latents(self, z: Tensor) -> Tensor:
        return self.audio.denormalize_latents(z)

    def encode_steps(self) -> list[Step]:
        raise ConfigError(_STREAMS)

    def decode_steps(self) -> list[Step]:
        raise ConfigError(_STREAMS)

    def _encode(self, x: Tensor) -> Tensor:
        return self._run("encode", x, None)

    def _decode(self, z: Tensor) -> Tensor:
        return self._run("decode", z, None)

    def _whole_frames(self, tile: Sequence[int] | None) -> int | None:
        """The frames of a tile of samples."""
        return None if tile is None else max(tile[0] // self.hop, 1)

    def _refuse(self, direction: Direction) -> NoReturn:
        other = "WaveformDecoder decodes" if direction == "decode" else "WaveformEncoder encodes"
        raise ConfigError(f"{type(self).__name__} has no way to {direction}; {other}")


class WaveformEncoder(_OverWaveforms):
    """Waveforms in [-1, 1] at 16 kHz to latents: (B, 2, 640k + 160) -> (B, 8, k + 1, 16), k > 0.

    Bit for bit the posterior of `waveform_to_mel`, of whose 4k + 2 frames the network leaves the last out of account,
    as officially. Computed in pieces.

    Raises:
        ShapeError: the number of samples is of another form.
    """

    encoder_modules = ("audio",)
    decoder_modules = ()

    def __init__(self, audio: AutoencoderKLLTX2Audio) -> None:
        super().__init__(audio, replace(audio.config, load_decoder=False))
        self.sampling_rate, self.hop = audio.arch.sample_rate, audio.arch.mel_hop_length

    def _mel_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        arch = self.audio.arch
        return (*shape[:2], shape[2] // self.hop, arch.mel_bins)

    def _plan(
        self,
        direction: Direction,
        shape: tuple[int, ...],
        memory_budget: int | str | None = None,
        tile: Sequence[int] | None = None,
        items: int | None = None,
        chunk: int | None = None,
    ) -> Plan:
        """That of the audio autoencoder, with its tile in samples."""
        if direction == "decode":
            self._refuse(direction)
        output, own = self.encoded_shape(shape), 4 * math.prod(shape)
        budget = None if memory_budget is None else max(parse_bytes(memory_budget) - own, 0)
        frames = self._whole_frames(tile)
        inner = self.audio._plan(
            direction,
            self._mel_shape(shape),
            budget,
            None if frames is None else (frames, self.audio.arch.mel_bins),
            items,
            chunk,
        )
        return replace(
            inner,
            input_shape=shape,
            output_shape=output,
            tile=None if inner.tile is None else (inner.tile[0] * self.hop,),
            _predict=lambda plan: (inner.whole if plan.tile is None else inner).forecast + own,
        )

    def _run(self, direction: Direction, x: Tensor, plan: Plan | None, progress: Progress | None = None) -> Tensor:
        plan = self._matching(direction, x, plan)
        frames, mel_shape = self._whole_frames(plan.tile), self._mel_shape(plan.input_shape)
        tile = None if frames is None else (frames, self.audio.arch.mel_bins)
        return self.audio._run(
            direction,
            self._mel(x)[:, :, : mel_shape[2]],
            self.audio._plan(direction, mel_shape, tile=tile, items=plan.items),
            progress,
        )

    def _stream(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Pieces along time, as soon as everything that they depend on has come."""
        if direction == "decode":
            self._refuse(direction)
        # Frame i is made from the samples around 160i; a crop reflects one sample less than it has.
        axis = Axis(down=self.hop, before=WINDOW // 2, after=WINDOW // 2 - self.hop + 1)
        return self.audio._stream(direction, slide(axis, self._checked(chunks), self._mel, _PIECE))

    def _mel(self, x_BCS: Tensor) -> Tensor:
        return self.audio.waveform_to_mel(x_BCS, self.sampling_rate)

    def _checked(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The chunks, each of the right layout and all together of a legal length."""
        shape: tuple[int, ...] = ()
        for chunk in chunks:
            self._check_layout("encode", chunk.shape)
            if shape and len(chunk) != shape[0]:
                raise ShapeError(f"all chunks of a stream need the same batch, got {shape[0]} and then {len(chunk)}")
            shape = (*chunk.shape[:2], (shape[2] if shape else 0) + chunk.shape[2])
            yield chunk
        if shape:
            self.encoded_shape(shape)


class WaveformDecoder(_OverWaveforms):
    """Latents to waveforms in [-1, 1] at the vocoder's rate, with n samples a frame: (B, 8, k + 1, 16) ->
    (B, 2, (4k + 1) n); n = 240 at 24 kHz (LTX-2.0), 480 at 48 kHz (LTX-2.3). Computed in pieces.

    Raises:
        ConfigError: the vocoder takes other spectrograms.
    """

    encoder_modules = ()
    decoder_modules = ("audio", "vocoder")

    def __init__(self, audio: AutoencoderKLLTX2Audio, vocoder: LTX2Vocoder) -> None:
        super().__init__(audio, replace(audio.config, load_encoder=False))
        made, taken = audio.arch.output_channels * audio.arch.mel_bins, vocoder.arch.in_channels
        if made != taken:
            raise ConfigError(f"the vocoder takes {taken} numbers a frame, the audio autoencoder makes {made}")
        self.vocoder = vocoder
        self.sampling_rate, self.hop = vocoder.sampling_rate, vocoder.hop_length
        # Of the waveforms that the latents were made of.
        self.encoded_sampling_rate = audio.arch.sample_rate

    @property
    def channels(self) -> tuple[int, int]:
        return self.vocoder.channels[0], self.audio.channels[1]

    def _plan(
        self,
        direction: Direction,
        shape: tuple[int, ...],
        memory_budget: int | str | None = None,
        tile: Sequence[int] | None = None,
        items: int | None = None,
        chunk: int | None = None,
    ) -> Plan:
        """Those of both networks as one, with the smaller one's tile; while one runs, the other's weights are there."""
        if direction == "encode":
            self._refuse(direction)
        budget = None if memory_budget is None else parse_bytes(memory_budget)
        weights = [
            sum(each.numel() * each.element_size() for each in network._half_parameters("decode"))
            for network in (self.audio, self.vocoder)
        ]
        mel_shape, frames = self.audio.decoded_shape(shape), self._whole_frames(tile)
        first = self.audio._plan(
            direction,
            shape,
            None if budget is None else max(budget - weights[1], 0),
            None if frames is None else (frames, self.audio.arch.mel_bins),
            items,
            chunk,
        )
        second = self.vocoder._plan(
            direction,
            mel_shape,
            None if budget is None else max(budget - weights[0], 0),
            None if frames is None else (frames * self.hop,),
            items,
            chunk,
        )
        tiles = [each.tile[0] * scale for each, scale in ((first, self.hop), (second, 1)) if each.tile is not None]
        return replace(
            second,
            mode="tiled" if tiles else "whole",
            input_shape=shape,
            output_shape=self.decoded_shape(shape),
            items=min(first.items, second.items),
            tile=(min(tiles),) if tiles else None,
            notes=tuple(dict.fromkeys((*first.notes, *second.notes))),
            _predict=lambda plan: Forecast(
                peak=max(first.peak_bytes + weights[1], second.peak_bytes + weights[0]),
                work=sum((each.whole if plan.tile is None else each).forecast.work for each in (first, second)),
            ),
        )

    def _run(self, direction: Direction, x: Tensor, plan: Plan | None, progress: Progress | None = None) -> Tensor:
        plan = self._matching(direction, x, plan)
        frames = self._whole_frames(plan.tile)
        tiles = (None, None) if frames is None else ((frames, self.audio.arch.mel_bins), (frames * self.hop,))
        mel = self.audio._run(
            direction, x, self.audio._plan(direction, tuple(x.shape), tile=tiles[0], items=plan.items), progress
        )
        mel_plan = self.vocoder._plan(direction, tuple(mel.shape), tile=tiles[1], items=plan.items)
        return self.vocoder._run(direction, mel, mel_plan, progress)

    def _stream(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Pieces along time, as soon as everything that they depend on has come."""
        if direction == "encode":
            self._refuse(direction)
        return self.vocoder._stream(direction, self.audio._stream(direction, chunks))


_STREAMS = "sound is computed in pieces along time by itself; there are no steps to cut in space"
