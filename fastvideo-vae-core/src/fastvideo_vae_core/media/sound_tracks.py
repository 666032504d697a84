"""The sound of one file, carried into a video that is being written from its pictures."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

from fastvideo_vae_core.media.audio import WRITE_BLOCK, Encoder, FFmpegSource, encodable_rate
from fastvideo_vae_core.media.files import ffmpeg_errors, readable, require

# Container -> sound that players take in it; a format's own list is longer, and some of it fails when written. Matroska
# takes everything.
_COPIED = {
    "mp4": ("aac", "ac3", "alac", "eac3", "flac", "mp3", "mp3float", "libopus", "opus"),
    "mov": ("aac", "ac3", "alac", "eac3", "mp3", "mp3float", "pcm_s16be", "pcm_s16le", "pcm_s24be", "pcm_s24le"),
    "webm": ("libopus", "libvorbis", "opus", "vorbis"),
}


def sound_start(path: str | os.PathLike[str]) -> tuple[Fraction, int]:
    """When the first sound track begins, in seconds behind the first picture, and how many tracks there are.

    Raises:
        MediaError: the file cannot be read.
    """
    av: Any = require("av", "media")
    with ffmpeg_errors(path, "read"), av.open(str(readable(path))) as opened:
        tracks = opened.streams.audio
        if not tracks:
            return Fraction(0), 0
        return Fraction(tracks[0].start_time or 0) * tracks[0].time_base - _origin(opened), len(tracks)


def _origin(container: Any) -> Fraction:
    """When the first picture is shown; 0 where there are none."""
    video = container.streams.video[0] if container.streams.video else None
    return Fraction(video.start_time or 0) * video.time_base if video else Fraction(0)


class SoundTracks:
    """Carries the sound of one file into a container that is being written, in step with its pictures.

    A track whose codec the container takes is copied packet by packet, bit for bit; any other is encoded anew (Opus for
    webm, else AAC). Times are counted from the first picture of the source, so sound and picture keep their offset.
    A source without sound gives no track. `advance` and `finish` take the end of the pictures written so far, in
    seconds; sound that starts later waits, and after `finish` is dropped.
    """

    def __init__(self, path: str | os.PathLike[str], container: Any) -> None:
        av: Any = require("av", "media")
        source = readable(path)
        copied = _COPIED.get(container.format.name, container.supported_codecs)
        with ffmpeg_errors(path, "read"), av.open(str(source)) as opened:
            origin = _origin(opened)
            found = [(stream.codec_context.name, stream.codec_context.sample_rate) for stream in opened.streams.audio]
        self._tracks: list[_CopiedTrack | _EncodedTrack] = [
            _CopiedTrack(source, track, origin, container)
            if codec in copied
            else _EncodedTrack(source, track, rate, origin, container)
            for track, (codec, rate) in enumerate(found)
        ]

    def advance(self, seconds: Fraction) -> None:
        for track in self._tracks:
            track.advance(seconds)

    def finish(self, seconds: Fraction) -> None:
        for track in self._tracks:
            track.advance(seconds)
            track.finish()

    def close(self) -> None:
        for track in self._tracks:
            track.close()


class _CopiedTrack:
    """Packets go through untouched, so the end falls on a packet: at most one packet (21 ms of AAC) late."""

    def __init__(self, source: Path, track: int, origin: Fraction, container: Any) -> None:
        av: Any = require("av", "media")
        self._source, self._container = source, container
        with ffmpeg_errors(source, "read"):
            self._opened = av.open(str(source))
            stream = self._opened.streams.audio[track]
            self._stream = container.add_stream_from_template(stream)
            self._packets = (packet for packet in self._opened.demux(stream) if packet.pts is not None)
            self._next = next(self._packets, None)
        if "language" in stream.metadata:
            self._stream.metadata["language"] = stream.metadata["language"]
        self._origin, self._rate = origin, stream.codec_context.sample_rate
        self._samples = self._frame_samples = stream.codec_context.frame_size
        self._expected: int | None = None

    def advance(self, seconds: Fraction) -> None:
        while self._next is not None and self._next.pts * self._next.time_base - self._origin < seconds:
            packet = self._next
            with ffmpeg_errors(self._source, "read"):
                self._next = next(self._packets, None)
            gap = self._next.pts - packet.pts if self._next is not None else 0
            self._retime(packet, packet.duration or gap)
            self._container.mux_one(packet)

    def _retime(self, packet: Any, duration: int) -> None:
        """Count from the first picture, in samples: Matroska's milliseconds would become gaps in a finer container."""
        tick = packet.time_base * self._rate
        start = round((packet.pts * packet.time_base - self._origin) * self._rate)
        if self._expected is not None and abs(start - self._expected) <= tick + 1:
            start = self._expected
        samples = duration * tick if duration else self._samples
        if tick > 1 and self._frame_samples:
            samples = min(samples + tick, self._frame_samples)
        self._samples = round(samples)
        packet.stream, packet.time_base = self._stream, Fraction(1, self._rate)
        packet.pts = packet.dts = start
        packet.duration = self._samples
        self._expected = start + self._samples

    def finish(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self._opened.close()


class _EncodedTrack:
    """Sound that the container cannot take as it is; its end is exact to the sample."""

    def __init__(self, source: Path, track: int, rate: int, origin: Fraction, container: Any) -> None:
        codec = "libopus" if container.format.name == "webm" else "aac"
        self._rate = encodable_rate(codec, rate)
        self._reader = FFmpegSource(source, track, self._rate)
        self._encoder = Encoder(container, codec, self._rate, self._reader.info.channels)
        lead = round((self._reader.start - origin) * self._rate)
        self._written = max(lead, 0)
        self._encoder.samples = self._written
        self._reader.read(max(-lead, 0))

    def advance(self, seconds: Fraction) -> None:
        while (wanted := min(round(seconds * self._rate) - self._written, WRITE_BLOCK)) > 0:
            samples = self._reader.read(wanted)
            if not samples.shape[1]:
                return
            self._encoder.write(samples)
            self._written += samples.shape[1]

    def finish(self) -> None:
        self._encoder.finish()

    def close(self) -> None:
        self._reader.close()
