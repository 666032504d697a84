"""Video: frames stream from file to file; a few are kept for the picture that compares them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from fastvideo_vae_core.cli.samples import Facts, Judge, Medium, Reading, Sink, Source, Writing
from fastvideo_vae_core.errors import MediaError
from fastvideo_vae_core.media.video import VideoReader, VideoWriter
from fastvideo_vae_core.metrics import SSIM_LEAST_SIDE, squared_error, ssim
from fastvideo_vae_core.report import clip_figure

# Frames of the comparison, and those that are kept while their number is unknown.
_SHOWN, _KEPT = 4, 8


class ClipSource:
    """The frames of a video file."""

    def __init__(self, reader: VideoReader) -> None:
        self._reader, info = reader, reader.info
        self.facts = Facts(frame_rate=info.frame_rate, pixel_aspect=info.pixel_aspect, color=info.color)
        self.shape: tuple[int, ...] = (1, 3, 0, info.height, info.width)
        self.expected = info.frames
        if self.expected is None and info.duration is not None:
            self.expected = round(info.duration * info.frame_rate)
        self.notes: list[str] = []
        if info.variable_frame_rate:
            rate = f"{float(info.frame_rate):.5g}"
            self.notes.append(f"its frames come at uneven times, and count as {rate} a second, evenly spaced")

    def read(self, count: int) -> Tensor:
        x = self._reader.read(count).unsqueeze(0)
        self.shape = (*self.shape[:2], self.shape[2] + x.shape[2], *self.shape[3:])
        return x


class ClipSink:
    """A video file."""

    def __init__(self, writer: VideoWriter) -> None:
        self._writer = writer
        self.notes: list[str] = []

    def write(self, y: Tensor) -> None:
        self._writer.write(y[0])


class ClipJudge:
    """PSNR from the error over all frames, the mean SSIM of the frames, and frames from all over the clip."""

    def __init__(self, facts: Facts) -> None:
        self._frame_rate = facts.frame_rate
        self._frames = 0
        # Sums over the frames, on the device, so that no frame waits for its number.
        self._errors: Tensor | float = 0.0
        self._similarities: Tensor | float = 0.0
        # Every so many frames one is kept, on the CPU.
        self._every = 1
        self._kept: list[tuple[int, Tensor, Tensor]] = []

    def update(self, x: Tensor, y: Tensor) -> None:
        large = min(x.shape[-2:]) >= SSIM_LEAST_SIDE
        for x_BCHW, y_BCHW in zip(x.unbind(2), y.unbind(2), strict=True):
            self._errors = self._errors + squared_error(x_BCHW, y_BCHW)[0]
            if large:
                self._similarities = self._similarities + ssim(x_BCHW, y_BCHW)[0]
            self._keep(x_BCHW[0], y_BCHW[0])
            self._frames += 1

    def metrics(self) -> dict[str, float]:
        error = float(self._errors) / self._frames
        metrics = {"psnr": 10 * math.log10(4 / error) if error else math.inf}
        if min(self._kept[0][1].shape[-2:]) >= SSIM_LEAST_SIDE:
            metrics["ssim"] = float(self._similarities) / self._frames
        return metrics

    def compare(self, path: Path, title: str, numbers: Mapping[str, str]) -> None:
        shown = min(_SHOWN, len(self._kept))
        spread = [round(index * (len(self._kept) - 1) / max(shown - 1, 1)) for index in range(shown)]
        rows = [(self._label(frame), x_CHW, y_CHW) for frame, x_CHW, y_CHW in (self._kept[each] for each in spread)]
        clip_figure(path, rows, title=title, metrics=numbers)

    def _keep(self, x_CHW: Tensor, y_CHW: Tensor) -> None:
        if self._frames % self._every:
            return
        self._kept.append((self._frames, x_CHW.to("cpu", copy=True), y_CHW.to("cpu", copy=True)))
        if len(self._kept) > _KEPT:
            self._every *= 2
            self._kept = self._kept[::2]

    def _label(self, frame: int) -> str:
        seconds = "" if self._frame_rate is None else f", {float(frame / self._frame_rate):.2f} s"
        return f"Frame {frame}{seconds}"


@contextmanager
def _open(path: Path, reading: Reading) -> Iterator[Source]:
    with VideoReader(path, device=reading.device) as reader:
        yield ClipSource(reader)


@contextmanager
def _create(path: Path, facts: Facts, shape: Sequence[int], writing: Writing) -> Iterator[Sink]:
    if facts.frame_rate is None:
        raise MediaError(f"nothing says how many frames a second {path} has; pass --frame-rate")
    writer = VideoWriter(
        path,
        frame_rate=Fraction(facts.frame_rate),
        height=shape[3],
        width=shape[4],
        crf=writing.crf,
        color=facts.color,
        pixel_aspect=facts.pixel_aspect,
        audio_from=writing.sound,
    )
    with writer:
        yield ClipSink(writer)


def _judge(facts: Facts) -> Judge:
    return ClipJudge(facts)


CLIPS = Medium(
    media="video",
    suffix=".mp4",
    writable=(".mp4", ".m4v", ".mov", ".mkv", ".webm"),
    open=_open,
    create=_create,
    judge=_judge,
    noun="clip",
    unit="frame",
)
