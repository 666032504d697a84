"""Video as tensors, through PyAV.

C channels (red, green, blue), T frames, H height, W width. Samples are display values in [-1, 1].

Only the YUV matrix and range are converted (see color.py). Primaries and transfer (the curve, PQ or HLG included) stay
as the source has them; pass `VideoInfo.color` on to `VideoWriter` to keep the tags true.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fastvideo_vae_core.errors import MediaError, ShapeError
from fastvideo_vae_core.media.color import MATRICES, PRIMARIES, RANGES, TRANSFERS, ColorTags, FromRGB, ToRGB
from fastvideo_vae_core.media.files import atomic_output, ffmpeg_errors, readable, require
from fastvideo_vae_core.media.images import require_finite, to_uint8
from fastvideo_vae_core.media.sound_tracks import SoundTracks

# suffix -> container and its options, codec and its options
_FORMATS: dict[str, tuple[str, dict[str, str], str, dict[str, str]]] = {
    ".mp4": ("mp4", {"movflags": "+faststart"}, "libx264", {}),
    ".m4v": ("mp4", {"movflags": "+faststart"}, "libx264", {}),
    ".mov": ("mov", {"movflags": "+faststart"}, "libx264", {}),
    ".mkv": ("matroska", {}, "libx264", {}),
    ".webm": ("webm", {}, "libvpx-vp9", {"b:v": "0", "row-mt": "1", "cpu-used": "4"}),
}
_VARIABLE_RATE_PACKETS = 256


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """The first video track of a file, as it is shown: `width` and `height` count after `rotation`.

    frames: as the container counts them, None where it does not; editing lists may hide some.
    frame_rate: frames per second, exact; the average where `variable_frame_rate` says that the intervals differ. Frames
        are read one after the other whatever their times, so writing them at `frame_rate` keeps the duration only.
    rotation: quarter turns that the reader applies, in degrees clockwise, after mirroring left to right if `mirrored`.
    pixel_aspect: width of a pixel over its height; pixels are never resampled.
    """

    width: int
    height: int
    frames: int | None
    frame_rate: Fraction
    variable_frame_rate: bool
    duration: Fraction | None
    codec: str
    pixel_format: str
    color: ColorTags
    has_audio: bool
    rotation: int
    mirrored: bool
    pixel_aspect: Fraction


def probe_video(path: str | os.PathLike[str]) -> VideoInfo:
    """Read the header and the first frame. MediaError: missing, broken, or without pictures."""
    with VideoReader(path) as reader:
        return reader.info


class VideoReader:
    """Reads a video in chunks, with memory for one chunk.

    `with VideoReader("clip.mp4", chunk=16) as reader: for x_CTHW in reader: ...` yields float32 (3, 16, H, W) in
    [-1, 1] and a shorter last chunk, on `device`; levels travel there as integers. Video of 8, 10 or 12 bits keeps its
    precision. Colours follow the tags (see ToRGB). Rotation is applied. Interlaced frames stay woven. A file that ends
    well before the duration that its track states (Matroska does) gives its frames with a warning.

    Raises:
        MediaError: on opening, the file is missing, broken, without pictures, or in a colour matrix that has no plain
            inverse (ICtCp, YCgCo, constant luminance); while reading, it is truncated, broken or changes its size.
    """

    def __init__(self, path: str | os.PathLike[str], *, chunk: int = 16, device: torch.device | str = "cpu") -> None:
        av: Any = require("av", "media")
        source = readable(path)
        self._path, self._chunk, self._device = path, chunk, device
        variable_frame_rate = _variable_frame_rate(source)
        with ffmpeg_errors(path, "read"):
            self._container = av.open(str(source))
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self._decoded = self._decode()
        first = next(self._decoded, None)
        if first is None:
            self._container.close()
            raise MediaError(f"{path} has a video track without a frame")
        self.info = _info(self._container, self._stream, first, variable_frame_rate)
        self._to_rgb = ToRGB(path, first, self.info.color, self.info.codec)
        self._frames = (self._upright(frame) for frame in chain([first], self._decoded))

    def read(self, frames: int) -> Tensor:
        """The next (3, frames, H, W); fewer at the end of the file, and (3, 0, H, W) after it."""
        levels = list(islice(self._frames, frames))
        shape = (3, len(levels), self.info.height, self.info.width)
        levels_CTHW = torch.empty(shape, dtype=self._to_rgb.dtype)
        for t, levels_CHW in enumerate(levels):
            levels_CTHW[:, t] = levels_CHW
        x_CTHW = levels_CTHW.to(self._device).to(torch.float32)
        return x_CTHW.div_(self._to_rgb.white / 2).sub_(1).clamp_(max=1)

    def __iter__(self) -> Iterator[Tensor]:
        while (x_CTHW := self.read(self._chunk)).shape[1]:
            yield x_CTHW

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._container.close()

    def _upright(self, frame: Any) -> Tensor:
        levels_CHW = torch.from_numpy(self._to_rgb(frame))
        if self.info.mirrored:
            levels_CHW = levels_CHW.flip(2)
        return levels_CHW.rot90(-self.info.rotation // 90, (1, 2))

    def _decode(self) -> Iterator[Any]:
        end, period, frames = 0.0, float(1 / _frame_rate(self._stream)), 0
        with ffmpeg_errors(self._path, "read"):
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    raise MediaError(f"{self._path} is truncated or broken in its pictures; copy the file again")
                for frame in packet.decode():
                    end = end if frame.time is None else max(end, frame.time + period)
                    frames += 1
                    yield frame
        stream = self._stream
        # MP4 says at its beginning what it holds; where the cut falls between two frames, nothing else tells of it.
        whole = stream.duration * stream.time_base if stream.duration and stream.frames else 0
        if frames < stream.frames and end < whole - period / 2:
            raise MediaError(f"{self._path} is truncated: {frames} of {stream.frames} frames are there; copy it again")
        stated = _stated_duration(self._stream)
        if stated is not None and end < stated - 2 * period:
            message = f"{self._path} ends after {end:.2f} of {float(stated):.2f} seconds; it may be truncated"
            warnings.warn(message, stacklevel=2)


class VideoWriter:
    """Writes a video chunk by chunk; the file appears when the `with` block ends well.

    mp4, m4v, mov and mkv get H.264, webm gets VP9. Width and height both even: 4:2:0, which every player takes; an odd
    one: 4:4:4, which loses no column but which some hardware players refuse (crop to even where that matters). RGB is
    converted with `color.matrix` and `color.range`, BT.709 limited by default, and the file says so. `frame_rate` is
    kept exactly. `crf` is the encoder's quality: 0 best, 16 visually lossless, 23 H.264's own default. `audio_from`
    names a file whose sound comes along, cut to the duration of the pictures: see SoundTracks.

    `with VideoWriter("out.mp4", frame_rate=info.frame_rate, height=480, width=832) as out: out.write(x_CTHW)`

    Raises:
        MediaError: an unknown suffix, an unwritable path, colours that cannot be written, NaN, or no frame at all.
        ShapeError: a chunk is not (3, T, height, width).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        frame_rate: Fraction | int,
        height: int,
        width: int,
        crf: int = 16,
        preset: str = "medium",
        color: ColorTags | None = None,
        pixel_aspect: Fraction = Fraction(1),
        audio_from: str | os.PathLike[str] | None = None,
    ) -> None:
        suffix = Path(path).suffix.lower()
        if suffix not in _FORMATS:
            raise MediaError(f"{path}: video is written as {' '.join(_FORMATS)}; choose one of these suffixes")
        if frame_rate <= 0 or height < 1 or width < 1:
            raise MediaError(f"{path} cannot be {width} × {height} at {frame_rate} frames per second; all are positive")
        self.path, self.height, self.width = path, height, width
        self.frame_rate = Fraction(frame_rate)
        self.frames = 0
        self._audio_from = audio_from
        self._format, self._format_options, self._codec, options = _FORMATS[suffix]
        self._options = {"crf": str(crf), **options}
        if self._codec == "libx264":
            self._options["preset"] = preset
        self._pixel_format = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        self._pixel_aspect = pixel_aspect
        self._color = (color or ColorTags()).for_writing()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        av: Any = require("av", "media")
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_output(self.path))
            with ffmpeg_errors(self.path, "written"):
                container = av.open(str(temporary), "w", format=self._format, options=self._format_options)
                self._container = stack.enter_context(container)
                self._stream = self._add_stream()
                self._from_rgb = FromRGB(self.width, self.height, self._pixel_format, self._color)
            self._sound = None if self._audio_from is None else SoundTracks(self._audio_from, container)
            if self._sound is not None:
                stack.callback(self._sound.close)
            self._stack = stack.pop_all()
        return self

    def write(self, x_CTHW: Tensor) -> None:
        """Append (3, T, height, width) in [-1, 1], of any float dtype and device."""
        if x_CTHW.ndim != 4 or x_CTHW.shape[0] != 3 or x_CTHW.shape[2:] != (self.height, self.width):
            wanted = f"(3, T, {self.height}, {self.width})"
            raise ShapeError(f"{self.path} takes {wanted}, got {tuple(x_CTHW.shape)}; pass one clip of a batch, x[0]")
        require_finite(x_CTHW, self.path)
        levels_THWC = to_uint8(x_CTHW).permute(1, 2, 3, 0).contiguous().cpu().numpy()
        with ffmpeg_errors(self.path, "written"):
            for levels_HWC in levels_THWC:
                frame = self._from_rgb(levels_HWC)
                frame.pts, frame.time_base = self.frames, 1 / self.frame_rate
                self._container.mux(self._stream.encode(frame))
                self.frames += 1
            if self._sound is not None:
                self._sound.advance(self.frames / self.frame_rate)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with ffmpeg_errors(self.path, "written"), self._stack:
            if not self.frames:
                raise MediaError(f"{self.path} got no frames, so nothing is written; write at least one")
            self._container.mux(self._stream.encode(None))
            if self._sound is not None:
                self._sound.finish(self.frames / self.frame_rate)

    def _add_stream(self) -> Any:
        stream = self._container.add_stream(self._codec, rate=self.frame_rate, options=self._options)
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = self.width, self.height, self._pixel_format
        context.time_base = 1 / self.frame_rate
        context.sample_aspect_ratio = self._pixel_aspect
        self._color.apply_to(context)
        return stream


def _info(container: Any, stream: Any, first: Any, variable_frame_rate: bool) -> VideoInfo:
    context = stream.codec_context
    mirrored, rotation = _orientation(first)
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    size = (first.width, first.height) if rotation % 180 == 0 else (first.height, first.width)
    duration = stream.duration * stream.time_base if stream.duration else _stated_duration(stream)
    if duration is None and container.duration:
        duration = Fraction(container.duration, 1_000_000)
    return VideoInfo(
        width=size[0],
        height=size[1],
        frames=stream.frames or None,
        frame_rate=_frame_rate(stream),
        variable_frame_rate=variable_frame_rate,
        duration=duration,
        codec=context.name,
        pixel_format=first.format.name,
        color=ColorTags(
            matrix=MATRICES.get(first.colorspace),
            range=RANGES.get(first.color_range),
            primaries=PRIMARIES.get(context.color_primaries),
            transfer=TRANSFERS.get(context.color_trc),
        ),
        has_audio=bool(container.streams.audio),
        rotation=rotation,
        mirrored=mirrored,
        pixel_aspect=aspect if rotation % 180 == 0 else 1 / aspect,
    )


def _frame_rate(stream: Any) -> Fraction:
    return Fraction(stream.average_rate or stream.guessed_rate or 25)


def _stated_duration(stream: Any) -> Fraction | None:
    """What Matroska says of one track, such as DURATION = 00:01:30.250000000; other containers say it elsewhere."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return int(match[1]) * 3600 + int(match[2]) * 60 + Fraction(match[3]) if match else None


def _orientation(frame: Any) -> tuple[bool, int]:
    """The display matrix as (mirror left to right first, then turn clockwise by so many degrees)."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, 0
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).astype(float)
    mirrored = bool(a * d - b * c < 0)
    angle = math.atan2(-b, -a) if mirrored else math.atan2(b, a)
    return mirrored, round(angle / (math.pi / 2)) % 4 * 90


def _variable_frame_rate(path: Path) -> bool:
    """Whether the times of the first frames stray from even spacing by more than the container's clock explains."""
    av: Any = require("av", "media")
    with ffmpeg_errors(path, "read"), av.open(str(path)) as container:
        if not container.streams.video:
            raise MediaError(f"{path} has no pictures")
        packets = islice(container.demux(video=0), _VARIABLE_RATE_PACKETS)
        times = sorted(packet.pts for packet in packets if packet.pts is not None)
    if len(times) == _VARIABLE_RATE_PACKETS:
        times = times[:-16]  # their neighbours in display order may come later in the file
    gaps = [after - before for before, after in pairwise(times)]
    return bool(gaps) and max(gaps) - min(gaps) > max(2, 0.1 * sum(gaps) / len(gaps))
