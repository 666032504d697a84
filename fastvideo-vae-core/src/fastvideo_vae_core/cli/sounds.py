"""Sound: blocks stream from file to file, at the rate and with the channels that the model takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastvideo_vae_core.audio_metrics import SISDR, STFT_LEAST_SAMPLES, STFTDistance
from fastvideo_vae_core.cli.samples import Facts, Judge, Medium, Reading, Sink, Source, Writing
from fastvideo_vae_core.errors import MediaError
from fastvideo_vae_core.media.audio import AudioReader, AudioWriter, Resampler
from fastvideo_vae_core.report import spectrogram_figure
from fastvideo_vae_core.spectrograms import Spectrograms

# Samples that are read at a time.
_BLOCK = 1 << 18


class SoundSource:
    """The sound of a file as the model takes it: mono is duplicated, another rate is resampled.

    Raises:
        MediaError: more channels than the model's without --downmix, or resampling that torchaudio is missing for.
    """

    def __init__(self, path: Path, reader: AudioReader, reading: Reading, mixed: int | None) -> None:
        info = reader.info
        self._blocks, self._channels = iter(reader), reading.channels
        self._device = reading.device
        rate = reading.sampling_rate or info.sample_rate
        self.notes: list[str] = []
        if mixed is not None:
            self.notes.append(f"{mixed} channels are mixed down to {info.channels}")
        if info.channels not in (1, reading.channels):
            way_out = "; --downmix mixes them" if info.channels > reading.channels <= 2 else "; convert it first"
            raise MediaError(f"{path} has {info.channels} channels, the model takes {reading.channels}{way_out}")
        if info.channels < reading.channels:
            self.notes.append(f"mono is duplicated to {reading.channels} channels")
        self._resampler = Resampler(info.sample_rate, rate)
        if rate != info.sample_rate:
            self.notes.append(f"resampled from {info.sample_rate} to {rate} Hz")
        self.facts = Facts(sampling_rate=rate)
        self.shape: tuple[int, ...] = (1, reading.channels, 0)
        samples = info.samples
        if samples is None and info.duration is not None:
            samples = round(info.duration * info.sample_rate)
        self.expected = None if samples is None else -(-samples * rate // info.sample_rate)
        self._held = torch.empty(info.channels, 0)
        self._ended = False

    def read(self, count: int) -> Tensor:
        held, length = [self._held], self._held.shape[1]
        while length < count and not self._ended:
            block = next(self._blocks, None)
            self._ended = block is None
            made = self._resampler.finish() if block is None else self._resampler.push(block)
            if made.numel():
                held.append(made)
                length += made.shape[1]
        joined = torch.cat(held, 1)
        self._held = joined[:, count:].clone()
        x_CS = joined[:, :count]
        self.shape = (*self.shape[:2], self.shape[2] + x_CS.shape[1])
        return x_CS.to(self._device).expand(self._channels, -1).unsqueeze(0)


class SoundSink:
    """A sound file."""

    def __init__(self, writer: AudioWriter) -> None:
        self._writer = writer
        self.notes: list[str] = []

    def write(self, y: Tensor) -> None:
        self._writer.write(y[0])


class SoundJudge:
    """SI-SDR and the distance of spectrograms, over the whole recording, and both spectrograms."""

    def __init__(self, facts: Facts) -> None:
        self._ratio, self._distance = SISDR(), STFTDistance()
        self._spectrograms = Spectrograms(facts.sampling_rate or 1)
        self._samples = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        self._ratio.update(x, y)
        self._distance.update(x, y)
        self._spectrograms.update(x[0], y[0])
        self._samples += x.shape[2]

    def metrics(self) -> dict[str, float]:
        metrics = {"si_sdr": self._ratio.value().item()}
        if self._samples >= STFT_LEAST_SAMPLES:
            metrics["stft_distance"] = self._distance.value().item()
        return metrics

    def compare(self, path: Path, title: str, numbers: Mapping[str, str]) -> None:
        spectrogram_figure(path, self._spectrograms.value(), title=title, metrics=numbers)


@contextmanager
def _open(path: Path, reading: Reading) -> Iterator[Source]:
    with AudioReader(path, block=_BLOCK) as reader:
        if not reading.downmix or reader.info.channels <= reading.channels:
            yield SoundSource(path, reader, reading, None)
            return
        mixed = reader.info.channels
    if reading.channels > 2:
        raise MediaError(f"--downmix makes mono or stereo, the model takes {reading.channels} channels; convert {path}")
    with AudioReader(path, block=_BLOCK, downmix="mono" if reading.channels == 1 else "stereo") as reader:
        yield SoundSource(path, reader, reading, mixed)


@contextmanager
def _create(path: Path, facts: Facts, shape: Sequence[int], writing: Writing) -> Iterator[Sink]:
    if facts.sampling_rate is None:
        raise MediaError(f"nothing says how many samples a second {path} has; make its latents again")
    with AudioWriter(path, sample_rate=facts.sampling_rate, channels=shape[1]) as writer:
        sink = SoundSink(writer)
        yield sink
    if writer.clipped:
        sink.notes.append(f"{writer.clipped} samples lay beyond full scale and were clipped")


def _judge(facts: Facts) -> Judge:
    return SoundJudge(facts)


SOUNDS = Medium(
    media="audio",
    suffix=".wav",
    writable=(".wav", ".flac", ".ogg", ".oga", ".mp3", ".m4a", ".opus", ".aif", ".aiff"),
    open=_open,
    create=_create,
    judge=_judge,
    noun="recording",
    unit="second",
)
