"""Sound as tensors: soundfile for wav, flac, ogg and aiff; PyAV for mp3, m4a, opus, and the sound of video files.

C channels, S samples per channel; float32, full scale is [-1, 1]. Numpy arrays carry the same letters.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from fastvideo_vae_core.errors import MediaError, ShapeError
from fastvideo_vae_core.media.files import atomic_output, ffmpeg_errors, readable, require

Samples = np.ndarray[Any, np.dtype[np.float32]]

# suffix -> libsndfile's format and subtype; 24 bits keep the noise floor at -144 dB and every player reads them.
_SOUNDFILE_FORMATS = {
    ".aif": ("AIFF", "PCM_24"),
    ".aiff": ("AIFF", "PCM_24"),
    ".flac": ("FLAC", "PCM_24"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".oga": ("OGG", "VORBIS"),
    ".ogg": ("OGG", "VORBIS"),
    ".wav": ("WAV", "PCM_24"),
}
# libsndfile writes mp3 well, but reads it wrongly in blocks shorter than its frames.
_READ_BY_SOUNDFILE = _SOUNDFILE_FORMATS.keys() - {".mp3"}
_FFMPEG_CODECS = {".m4a": "aac", ".opus": "libopus"}
_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}
_BIT_RATE_PER_CHANNEL = 128_000
# libsndfile's Vorbis encoder overflows the stack when it is handed minutes of samples at once.
WRITE_BLOCK = 65_536


@dataclass(frozen=True, kw_only=True)
class AudioInfo:
    """What a file says about its (first) sound track; `samples` is None where only decoding would tell."""

    sample_rate: int
    channels: int
    samples: int | None
    duration: Fraction | None
    codec: str


def probe_audio(path: str | os.PathLike[str]) -> AudioInfo:
    """Read the header only. MediaError: missing, not sound, or a video without sound."""
    with AudioReader(path) as reader:
        return reader.info


def read_audio(path: str | os.PathLike[str]) -> tuple[Tensor, int]:
    """Read a whole file: float32 (C, S) and the samples per second, such as (2, 441000) and 44100 for ten seconds.

    Raises:
        MediaError: the file is missing, truncated, broken, or has no sound.
    """
    with AudioReader(path) as reader:
        blocks = list(reader)
        empty = torch.empty(reader.info.channels, 0)
        return torch.cat(blocks, dim=1) if blocks else empty, reader.info.sample_rate


def write_audio(path: str | os.PathLike[str], x_CS: Tensor, sample_rate: int) -> int:
    """Write (C, S), whole or not at all; returns how many values were clamped to [-1, 1]. See AudioWriter."""
    with AudioWriter(path, sample_rate=sample_rate, channels=x_CS.shape[0] if x_CS.ndim == 2 else 0) as writer:
        writer.write(x_CS)
        return writer.clipped


def resample(x_CS: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Change the sampling rate of (..., S) to (..., ceil(S * to_rate / from_rate)), on the tensor's device.

    torchaudio's windowed sinc with its default settings, which is what the official pipelines feed their encoders.

    Raises:
        MediaError: a rate is not positive, or torchaudio (extra `audio`) is not there or refuses this torch.
    """
    if from_rate <= 0 or to_rate <= 0:
        raise MediaError(f"cannot resample from {from_rate} to {to_rate} Hz; rates are positive whole numbers")
    if from_rate == to_rate:
        return x_CS
    functional: Any = require("torchaudio.functional", "audio")
    resampled: Tensor = functional.resample(x_CS, from_rate, to_rate)
    return resampled


class Resampler:
    """`resample` for sound that comes in blocks, with the same numbers and memory for one block and its surroundings.

    `[*map(resampler.push, blocks), resampler.finish()]`, joined along the last axis, is `resample` of all blocks.

    Raises:
        MediaError: as `resample`.
    """

    def __init__(self, from_rate: int, to_rate: int) -> None:
        resample(torch.zeros(1), from_rate, to_rate)  # refuses what cannot be done before anything is read
        self._rates = from_rate, to_rate
        common = math.gcd(from_rate, to_rate)
        # The kernels repeat after so many samples, which become so many.
        self._from, self._to = from_rate // common, to_rate // common
        # torchaudio's sinc reaches six zero crossings of its cut-off, 0.99 of the lower rate, and one period further.
        width = math.ceil(6 * self._from / (0.99 * min(self._from, self._to)))
        self._context = (-(-width // self._from) + 1) * self._from
        self._held: Tensor | None = None
        self._lead = 0

    def push(self, x: Tensor) -> Tensor:
        """Take the next (..., S) and give what is finished, which may be nothing."""
        if self._from == self._to:
            return x
        held = self._held = x if self._held is None else torch.cat([self._held, x], dim=-1)
        ready = (held.shape[-1] - self._context - self._lead) // self._from * self._from
        if ready <= 0:
            return held[..., :0]
        made = self._made(held, self._lead + ready)
        # A copy, so that what is no longer needed can be released.
        start = max(self._lead + ready - self._context, 0)
        self._held, self._lead = held[..., start:].clone(), self._lead + ready - start
        return made

    def finish(self) -> Tensor:
        """The rest."""
        if self._held is None:
            return torch.empty(0)
        return self._made(self._held, self._held.shape[-1])

    def _made(self, held: Tensor, stop: int) -> Tensor:
        """What the samples up to `stop` become, behind those that were finished before."""
        made = resample(held, *self._rates)
        return made[..., self._lead // self._from * self._to : -(-stop * self._to // self._from)]


class AudioReader:
    """Reads sound in blocks, with memory for one block.

    `with AudioReader("song.flac", block=48_000) as reader: for x_CS in reader: ...` yields (C, 48000) and a shorter
    last block. Of a file with several tracks, `track` counts the sound tracks from 0 (PyAV formats only). With
    `downmix`, more channels than that become "mono" or "stereo" by FFmpeg's rules, which follow ITU-R BS.775: centre
    and surround at -3 dB, no low-frequency effects, and all of it so much lower that nothing can clip.

    Raises:
        MediaError: on opening, the file is missing or holds no such sound; while reading, it is truncated or broken.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        block: int = 1 << 16,
        track: int = 0,
        downmix: Literal["mono", "stereo"] | None = None,
    ) -> None:
        self._block = block
        source = readable(path)
        by_soundfile = source.suffix.lower() in _READ_BY_SOUNDFILE
        self._source: _Source = _SoundFileSource(source) if by_soundfile else FFmpegSource(source, track, None)
        if downmix is not None and self._source.info.channels > (1 if downmix == "mono" else 2):
            self._source.close()
            # libsndfile does not tell which channel is which.
            self._source = FFmpegSource(source, track, None, layout=downmix)
        self.info = self._source.info

    def read(self, samples: int) -> Tensor:
        """The next (C, samples); fewer at the end of the file, and (C, 0) after it."""
        return torch.from_numpy(self._source.read(samples))

    def __iter__(self) -> Iterator[Tensor]:
        while (x_CS := self.read(self._block)).shape[1]:
            yield x_CS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._source.close()


class AudioWriter:
    """Writes sound in blocks; the file appears when the `with` block ends well.

    wav, aiff and flac get 24-bit integers; ogg Vorbis; mp3 as libsndfile encodes it; m4a AAC and opus at 128 kbit/s per
    channel. Values outside [-1, 1] are clamped, and `clipped` counts them, so that no clipping goes unseen.

    Raises:
        MediaError: an unknown suffix, a rate or channel count that the format cannot take, an unwritable path, or NaN.
        ShapeError: a block is not (channels, S).
    """

    def __init__(self, path: str | os.PathLike[str], *, sample_rate: int, channels: int) -> None:
        suffix = Path(path).suffix.lower()
        if suffix not in _SOUNDFILE_FORMATS and suffix not in _FFMPEG_CODECS:
            known = " ".join(sorted((*_SOUNDFILE_FORMATS, *_FFMPEG_CODECS)))
            raise MediaError(f"{path}: sound is written as {known}; choose one of these suffixes")
        if channels < 1 or sample_rate < 1:
            raise MediaError(f"{path} needs (C, S) sound with a positive rate, got C = {channels} at {sample_rate} Hz")
        self.path, self.sample_rate, self.channels = path, sample_rate, channels
        self.samples = 0
        self.clipped = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        suffix = Path(self.path).suffix.lower()
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_output(self.path))
            sink_class = _SoundFileSink if suffix in _SOUNDFILE_FORMATS else _FFmpegSink
            self._sink: _Sink = sink_class(self.path, temporary, self.sample_rate, self.channels)
            stack.callback(self._sink.close)
            self._stack = stack.pop_all()
        return self

    def write(self, x_CS: Tensor) -> None:
        """Append (channels, S) of any float dtype and device."""
        if x_CS.ndim != 2 or x_CS.shape[0] != self.channels:
            raise ShapeError(f"{self.path} takes ({self.channels}, S), got {tuple(x_CS.shape)}; pass channels first")
        samples: Samples = x_CS.detach().to("cpu", torch.float32).numpy()
        if not np.isfinite(samples).all():
            raise MediaError(f"cannot write {self.path}: {int((~np.isfinite(samples)).sum())} samples are not finite")
        self.clipped += int((np.abs(samples) > 1).sum())
        self.samples += samples.shape[1]
        for start in range(0, samples.shape[1], WRITE_BLOCK):
            self._sink.write(np.clip(samples[:, start : start + WRITE_BLOCK], -1, 1))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._sink.finish()


class _Source(Protocol):
    info: AudioInfo

    def read(self, samples: int) -> Samples: ...
    def close(self) -> None: ...


class _SoundFileSource:
    def __init__(self, path: Path) -> None:
        self._soundfile: Any = require("soundfile", "media")
        self._path = path
        try:
            self._file = self._soundfile.SoundFile(path)
        except self._soundfile.SoundFileError as error:
            raise MediaError(f"{path} cannot be read as sound: {error}") from error
        rate, samples = self._file.samplerate, self._file.frames
        self.info = AudioInfo(
            sample_rate=rate,
            channels=self._file.channels,
            samples=samples,
            duration=Fraction(samples, rate),
            codec=self._file.subtype.lower(),
        )
        self._position = 0

    def read(self, samples: int) -> Samples:
        try:
            block_SC = self._file.read(samples, dtype="float32", always_2d=True)
        except self._soundfile.SoundFileError as error:
            raise MediaError(f"{self._path} is broken after {self._position} samples: {error}") from error
        self._position += len(block_SC)
        if len(block_SC) < samples and self._position < self._file.frames:
            raise MediaError(f"{self._path} is truncated: {self._position} of {self._file.frames} samples are there")
        return np.ascontiguousarray(block_SC.T)

    def close(self) -> None:
        self._file.close()


class FFmpegSource:
    """One sound track through PyAV, at its own rate or at `rate`."""

    def __init__(self, path: Path, track: int, rate: int | None, layout: str | None = None) -> None:
        av: Any = require("av", "media")
        self._path, self._resampled = path, rate is not None
        with ffmpeg_errors(path, "read"):
            self._container = av.open(str(path))
        streams = self._container.streams.audio
        if track >= len(streams):
            self._container.close()
            raise MediaError(f"{path} has {len(streams)} sound tracks, and track {track} (from 0) was asked for")
        stream = streams[track]
        context = stream.codec_context
        duration = None if stream.duration is None else stream.duration * stream.time_base
        self.start = Fraction(stream.start_time or 0) * stream.time_base
        target = av.AudioLayout(layout or context.layout)
        self.info = AudioInfo(
            sample_rate=rate or context.sample_rate,
            channels=len(target.channels),
            samples=None,
            duration=duration,
            codec=context.name,
        )
        # FFmpeg mixes floating point without lowering it, and integers so that nothing can clip.
        sample_format = "fltp" if layout is None else "s32p"
        self._blocks = self._decode(stream, av.AudioResampler(sample_format, target, self.info.sample_rate))
        self._pending: Samples = np.empty((self.info.channels, 0), np.float32)

    def _decode(self, stream: Any, resampler: Any) -> Iterator[Samples]:
        """MP4 states how much of its last packet counts, and FFmpeg gives the padding after it all the same."""
        states_length = "mp4" in self._container.format.name and not self._resampled
        held: list[Samples] = []
        stated = 0
        for packet in self._container.demux(stream):
            blocks = [_floats(block) for frame in packet.decode() for block in resampler.resample(frame)]
            if packet.size:
                yield from held
                held, stated = [], (packet.duration or 0) if states_length else 0
            held += blocks
        held += [_floats(block) for block in resampler.resample(None)]
        if held:
            last: Samples = np.concatenate(held, axis=1)
            yield last[:, : round(stated * stream.time_base * self.info.sample_rate)] if stated else last

    def read(self, samples: int) -> Samples:
        blocks, held = [self._pending], self._pending.shape[1]
        with ffmpeg_errors(self._path, "read"):
            while held < samples and (block := next(self._blocks, None)) is not None:
                blocks.append(block)
                held += block.shape[1]
        joined: Samples = np.concatenate(blocks, axis=1)
        self._pending = joined[:, samples:].copy()
        return joined[:, :samples].copy()

    def close(self) -> None:
        self._container.close()


def _floats(block: Any) -> Samples:
    samples: np.ndarray[Any, Any] = block.to_ndarray()
    return samples if samples.dtype == np.float32 else (samples / 2.0**31).astype(np.float32)


class _Sink(Protocol):
    def write(self, samples: Samples) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class _SoundFileSink:
    def __init__(self, path: str | os.PathLike[str], temporary: Path, rate: int, channels: int) -> None:
        self._soundfile: Any = require("soundfile", "media")
        self._path = path
        name, subtype = _SOUNDFILE_FORMATS[temporary.suffix.lower()]
        try:
            self._file = self._soundfile.SoundFile(temporary, "w", rate, channels, subtype, format=name)
        except self._soundfile.SoundFileError as error:
            raise MediaError(f"cannot write {path}: {name} does not take {channels} channels at {rate} Hz") from error

    def write(self, samples: Samples) -> None:
        try:
            self._file.write(samples.T)
        except (self._soundfile.SoundFileError, AssertionError) as error:  # it asserts that all samples were written
            raise MediaError(f"cannot write {self._path}: {error or 'the disk is full'}") from error

    def finish(self) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()


class _FFmpegSink:
    def __init__(self, path: str | os.PathLike[str], temporary: Path, rate: int, channels: int) -> None:
        av: Any = require("av", "media")
        self._path = path
        codec = _FFMPEG_CODECS[temporary.suffix.lower()]
        usable = encodable_rate(codec, rate)
        if rate != usable:
            raise MediaError(f"cannot write {path}: {codec} does not take {rate} Hz; resample to {usable} first")
        with ffmpeg_errors(path, "written"):
            # In its default milliseconds, MP4 could not say where the padding of the last packet begins.
            options = {"movie_timescale": str(rate)} if codec == "aac" else {}
            self._container = av.open(str(temporary), "w", options=options)
            self._encoder = Encoder(self._container, codec, rate, channels)

    def write(self, samples: Samples) -> None:
        with ffmpeg_errors(self._path, "written"):
            self._encoder.write(samples)

    def finish(self) -> None:
        with ffmpeg_errors(self._path, "written"):
            self._encoder.finish()
            self._container.close()

    def close(self) -> None:
        self._container.close()


class Encoder:
    """One encoded sound track of a container; `samples` is where the next block starts."""

    def __init__(self, container: Any, codec: str, rate: int, channels: int) -> None:
        if channels not in _LAYOUTS:
            raise MediaError(
                f"{codec} takes {', '.join(map(str, _LAYOUTS))} channels, got {channels}; write wav instead"
            )
        self._container, self._layout, self._rate = container, _LAYOUTS[channels], rate
        self._stream = container.add_stream(codec, rate=rate, layout=self._layout)
        self._stream.bit_rate = _BIT_RATE_PER_CHANNEL * channels
        self.samples = 0

    def write(self, samples: Samples) -> None:
        av: Any = require("av", "media")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts, frame.time_base = self._rate, self.samples, Fraction(1, self._rate)
        self.samples += samples.shape[1]
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))


def encodable_rate(codec: str, rate: int) -> int:
    av: Any = require("av", "media")
    rates = av.Codec(codec, "w").audio_rates
    return rate if rates is None or rate in rates else 48_000
