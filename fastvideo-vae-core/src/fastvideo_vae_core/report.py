"""Pictures that show what an autoencoder did: original, reconstruction, and where they differ.

C channels, H height, W width; h and w as shown; F bands, T columns of time. Figures are drawn by Agg without pyplot, so
that neither a display nor global state is needed.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from fastvideo_vae_core.errors import MediaError, ShapeError
from fastvideo_vae_core.media.files import atomic_output, require
from fastvideo_vae_core.media.images import require_finite, to_uint8
from fastvideo_vae_core.metrics import psnr, ssim
from fastvideo_vae_core.spectrograms import Spectra

# All lengths are pixels of the PNG: pictures are shown at whole-number scales, so that no pixel is blurred or uneven.
_DPI = 160
_LEAST_SIDE, _LARGEST_SIDE, _LARGEST_SIDE_OF_ROWS = 384, 720, 480
_LEAST_COLUMN = 340
_MARGIN, _GAP = 32, 28
_TITLE, _NUMBERS, _HEADING, _NOTE = 52, 44, 46, 46
_BAR, _BAR_GAP, _BAR_LABELS = 22, 14, 96
_BAR_WORDS = {"absolute error in 8-bit levels": 320, "8-bit levels": 130, "levels": 70}
_INK, _QUIET, _FRAME = "#1a1a1a", "#6b6b6b", "#c8c8c8"
_ROUND_LEVELS = (1, 2, 5, 10, 20, 50, 100, 150, 200, 255)
_SPECTROGRAM_WIDTH, _SPECTROGRAM_HEIGHT, _FREQUENCIES = 1120, 256, 84
_DECIBELS, _DIFFERENCE = 80, 20


def comparison_figure(
    path: str | os.PathLike[str],
    original_CHW: Tensor,
    reconstruction_CHW: Tensor,
    *,
    title: str = "",
    metrics: Mapping[str, float | str] | None = None,
) -> None:
    """Write one PNG: the original, its reconstruction, and the absolute error in 8-bit levels with its scale.

    Both pictures are (3, H, W) in [-1, 1]; values beyond are shown and measured clamped. The error of a pixel is that
    of its worst channel; its colours end at the 99th percentile, rounded up, and the bar has an arrow where some pixels
    lie beyond. `metrics` maps labels to values, such as {"PSNR": "31.20 dB", "SSIM": 0.93}; without it, PSNR and SSIM
    are measured here. Small pictures are enlarged, large ones averaged down, by whole numbers, and the note below says
    so; numbers are taken before that, and the error is brought down by its maximum, so that no fault disappears.

    Raises:
        ShapeError: the shapes differ or are not (3, H, W).
        MediaError: an unwritable path or another suffix than .png, NaN, or matplotlib (extra `report`) is missing.
    """
    _check_pair(path, original_CHW, reconstruction_CHW)
    row = _Row.of("Original", original_CHW, reconstruction_CHW)
    numbers = _measured(row.original, row.reconstruction) if metrics is None else metrics
    _write(path, _Comparison([row], _LARGEST_SIDE), title, numbers)


def clip_figure(
    path: str | os.PathLike[str],
    frames: Sequence[tuple[str, Tensor, Tensor]],
    *,
    title: str = "",
    metrics: Mapping[str, float | str] | None = None,
) -> None:
    """Write one PNG with a row for each of some frames of a clip: (label, original, reconstruction), all of one size.

    Rows are as in `comparison_figure`, and their errors have one scale. `metrics` are those of the whole clip.

    Raises:
        ShapeError: no frames, or shapes that differ or are not (3, H, W).
        MediaError: as `comparison_figure`.
    """
    if len({tuple(original.shape) for _, original, _ in frames}) != 1:
        raise ShapeError(f"a comparison takes frames of one shape, got {[tuple(each.shape) for _, each, _ in frames]}")
    for _, original, reconstruction in frames:
        _check_pair(path, original, reconstruction)
    rows = [_Row.of(*frame) for frame in frames]
    _write(path, _Comparison(rows, _LARGEST_SIDE_OF_ROWS), title, metrics or {})


def spectrogram_figure(
    path: str | os.PathLike[str],
    spectra: Spectra,
    *,
    title: str = "",
    metrics: Mapping[str, float | str] | None = None,
) -> None:
    """Write one PNG: both spectrograms on one scale of 80 dB, and below them how much louder the reconstruction is.

    Frequencies are spaced as on the mel scale. What lies below the scale counts as its lower end.

    Raises:
        MediaError: as `comparison_figure`.
    """
    if Path(path).suffix.lower() != ".png":
        raise MediaError(f"{path}: figures are written as .png; choose that suffix")
    _write(path, _Sound(spectra), title, metrics or {})


def _check_pair(path: str | os.PathLike[str], original_CHW: Tensor, reconstruction_CHW: Tensor) -> None:
    if Path(path).suffix.lower() != ".png":
        raise MediaError(f"{path}: figures are written as .png; choose that suffix")
    if original_CHW.ndim != 3 or original_CHW.shape[0] != 3 or original_CHW.shape != reconstruction_CHW.shape:
        shapes = f"{tuple(original_CHW.shape)} and {tuple(reconstruction_CHW.shape)}"
        raise ShapeError(f"a comparison takes two pictures of one shape (3, H, W), got {shapes}")
    require_finite(reconstruction_CHW, path)


def _write(
    path: str | os.PathLike[str], drawn: _Comparison | _Sound, title: str, numbers: Mapping[str, float | str]
) -> None:
    line = "     ".join(f"{label} {_number(value)}" for label, value in numbers.items())
    with atomic_output(path) as temporary:
        drawn.draw(title, line).savefig(temporary, dpi=_DPI, facecolor="white")


@dataclass(frozen=True)
class _Row:
    """What a row of a comparison is called, and its pictures on the CPU, clamped."""

    label: str
    original: Tensor
    reconstruction: Tensor

    @classmethod
    def of(cls, label: str, original_CHW: Tensor, reconstruction_CHW: Tensor) -> _Row:
        original, reconstruction = (x.detach().float().cpu().clamp(-1, 1) for x in (original_CHW, reconstruction_CHW))
        return cls(label, original, reconstruction)


class _Comparison:
    """Rows of three panels each, and the sheet that they stand on."""

    def __init__(self, rows: Sequence[_Row], largest_side: int) -> None:
        _, height, width = rows[0].original.shape
        self._scale = _Scale.of(height, width, largest_side)
        errors = [(row.original - row.reconstruction).abs().amax(0) * 127.5 for row in rows]
        maps = [self._scale.map(error_HW) for error_HW in errors]
        self._rows = [
            [
                (row.label, self._scale.picture(row.original)),
                ("Reconstruction", self._scale.picture(row.reconstruction)),
                (f"Error: mean {error_HW.mean():.1f}, largest {error_HW.amax():.0f}", shown),
            ]
            for row, error_HW, shown in zip(rows, errors, maps, strict=True)
        ]
        percentile = float(np.percentile(np.stack(maps), 99))
        self._top = next((level for level in _ROUND_LEVELS if level >= percentile), _ROUND_LEVELS[-1])
        self._exceeded = any(bool(error_HW.amax() > self._top) for error_HW in errors)

    def draw(self, title: str, line: str) -> Any:
        scale, column = self._scale, max(self._scale.w, _LEAST_COLUMN)
        head = _MARGIN + (_TITLE if title else 0) + (_NUMBERS if line else 0)
        width = 2 * _MARGIN + 3 * column + 2 * _GAP + _BAR_GAP + _BAR + _BAR_LABELS
        bottom = head + len(self._rows) * (_HEADING + scale.h)
        sheet = _Sheet(width, bottom + _NOTE + _MARGIN // 2)
        if title:
            sheet.text(_MARGIN, _MARGIN + 22, title, size=13, weight="bold")
        if line:
            sheet.text(_MARGIN, head - 24, line, size=11)
        for index, row in enumerate(self._rows):
            self._draw_row(sheet, row, head + index * (_HEADING + scale.h) + _HEADING, column)
        sheet.text(_MARGIN, bottom + 24, scale.note(), size=8.5, color=_QUIET)
        return sheet.figure

    def _draw_row(self, sheet: _Sheet, row: list[tuple[str, np.ndarray[Any, Any]]], top: int, column: int) -> None:
        scale = self._scale
        for place, (heading, picture) in enumerate(row):
            left = _MARGIN + place * (column + _GAP)
            sheet.text(left, top - 24, heading, size=10, room=column)
            axes = sheet.axes(left, top, scale.w, scale.h)
            shown = axes.imshow(picture, cmap="magma", vmin=0, vmax=self._top, interpolation="nearest", aspect="auto")
        bar = sheet.axes(left + scale.w + _BAR_GAP, top, _BAR, scale.h)
        label = next((words for words, room in _BAR_WORDS.items() if scale.h >= room), "")
        sheet.color_bar(shown, bar, label, ticks=min(max(scale.h // 50, 1), 6), arrow=self._exceeded)


class _Sound:
    """Three panels below each other: the original, the reconstruction, and the difference."""

    def __init__(self, spectra: Spectra) -> None:
        self._spectra = spectra
        original, reconstruction = spectra.original_FT, spectra.reconstruction_FT
        top = 10 * int(np.ceil(max(original.max(), reconstruction.max()) / 10))
        levels = [np.clip(each, top - _DECIBELS, top) for each in (original, reconstruction)]
        self._panels = [
            ("Original", levels[0], "magma", (top - _DECIBELS, top), "dB of full scale"),
            ("Reconstruction", levels[1], "magma", (top - _DECIBELS, top), "dB of full scale"),
            ("Reconstruction over original", levels[1] - levels[0], "RdBu_r", (-_DIFFERENCE, _DIFFERENCE), "dB"),
        ]

    def draw(self, title: str, line: str) -> Any:
        head = _MARGIN + (_TITLE if title else 0) + (_NUMBERS if line else 0)
        left = _MARGIN + _FREQUENCIES
        width = left + _SPECTROGRAM_WIDTH + _BAR_GAP + _BAR + _BAR_LABELS + _MARGIN
        panel = _HEADING + _SPECTROGRAM_HEIGHT
        sheet = _Sheet(width, head + len(self._panels) * panel + 2 * _NOTE)
        if title:
            sheet.text(_MARGIN, _MARGIN + 22, title, size=13, weight="bold")
        if line:
            sheet.text(_MARGIN, head - 24, line, size=11)
        for index, (heading, levels, colors, (low, high), unit) in enumerate(self._panels):
            top = head + index * panel + _HEADING
            sheet.text(left, top - 24, heading, size=10)
            axes = sheet.axes(left, top, _SPECTROGRAM_WIDTH, _SPECTROGRAM_HEIGHT)
            extent = (0, self._spectra.seconds, 0, levels.shape[0])
            shown = axes.imshow(levels, cmap=colors, vmin=low, vmax=high, origin="lower", aspect="auto", extent=extent)
            self._label(axes, last=index == len(self._panels) - 1)
            bar = sheet.axes(left + _SPECTROGRAM_WIDTH + _BAR_GAP, top, _BAR, _SPECTROGRAM_HEIGHT)
            sheet.color_bar(shown, bar, unit, ticks=4, arrow=False)
        return sheet.figure

    def _label(self, axes: Any, *, last: bool) -> None:
        edges = self._spectra.edges
        shown = [hertz for hertz in (100, 500, 1000, 2000, 5000, 10_000, 20_000) if hertz < edges[-1]]
        names = [f"{hertz // 1000} kHz" if hertz >= 1000 else f"{hertz} Hz" for hertz in shown]
        axes.set_yticks(np.interp(shown, edges, range(len(edges))), names)
        axes.tick_params(labelsize=8.5, color=_FRAME, labelcolor=_INK, length=4, width=0.5)
        if last:
            axes.xaxis.set_major_locator(require("matplotlib.ticker", "report").MaxNLocator(nbins=10))
            axes.set_xlabel("seconds", size=8.5, color=_QUIET)


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """Pictures of height × width, shown at h × w: enlarged `times`, or `per` pixels averaged to one each way."""

    height: int
    width: int
    times: int
    per: int

    @classmethod
    def of(cls, height: int, width: int, largest_side: int = _LARGEST_SIDE) -> _Scale:
        longest = max(height, width)
        return cls(
            height=height, width=width, times=max(_LEAST_SIDE // longest, 1), per=max(-(-longest // largest_side), 1)
        )

    @property
    def h(self) -> int:
        return -(-self.height // self.per) * self.times

    @property
    def w(self) -> int:
        return -(-self.width // self.per) * self.times

    def picture(self, x_CHW: Tensor) -> np.ndarray[Any, Any]:
        small = F.avg_pool2d(x_CHW[None], self.per, ceil_mode=True, count_include_pad=False)[0]
        levels: np.ndarray[Any, Any] = to_uint8(small).permute(1, 2, 0).numpy()
        return levels

    def map(self, x_HW: Tensor) -> np.ndarray[Any, Any]:
        small: np.ndarray[Any, Any] = F.max_pool2d(x_HW[None, None], self.per, ceil_mode=True)[0, 0].numpy()
        return small

    def note(self) -> str:
        size = f"{self.width} × {self.height} pixels"
        if self.per > 1:
            return f"{size}, shown at 1/{self.per}; of each {self.per} × {self.per} pixels the largest error"
        return f"{size}, shown {self.times} times as large" if self.times > 1 else size


class _Sheet:
    """A matplotlib figure that is addressed in pixels from its top left corner."""

    def __init__(self, width: int, height: int) -> None:
        figure_module: Any = require("matplotlib.figure", "report")
        backend: Any = require("matplotlib.backends.backend_agg", "report")
        self.width, self.height = width, height
        self.figure = figure_module.Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        self._renderer = backend.FigureCanvasAgg(self.figure).get_renderer()

    def axes(self, left: int, top: int, width: int, height: int) -> Any:
        bottom = self.height - top - height
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box, xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=_FRAME, linewidth=0.5)
        return axes

    def text(self, left: int, middle: int, words: str, *, room: int = 0, **style: Any) -> None:
        """One line, cut with an ellipsis where it would leave its room, by default the sheet."""
        style = {"color": _INK, "va": "center_baseline", "parse_math": False, **style}
        drawn = self.figure.text(left / self.width, 1 - middle / self.height, words, **style)
        room = room or self.width - left - _MARGIN

        def fits(letters: int) -> bool:
            drawn.set_text(words if letters == len(words) else words[:letters].rstrip() + "…")
            return bool(drawn.get_window_extent(self._renderer).width <= room)

        if not fits(len(words)):
            fits(bisect_left(range(len(words)), True, key=lambda letters: not fits(letters)) - 1)

    def color_bar(self, shown: Any, axes: Any, label: str, *, ticks: int, arrow: bool) -> None:
        bar = self.figure.colorbar(shown, cax=axes, extend="max" if arrow else "neither", extendfrac=0.04)
        bar.outline.set(linewidth=0.5, edgecolor=_FRAME)
        bar.locator = require("matplotlib.ticker", "report").MaxNLocator(nbins=ticks, integer=True)
        bar.ax.tick_params(labelsize=8.5, color=_FRAME, labelcolor=_INK, length=4, width=0.5)
        bar.set_label(label, size=8.5, color=_QUIET)


def _measured(original: Tensor, reconstruction: Tensor) -> dict[str, float | str]:
    numbers: dict[str, float | str] = {"PSNR": f"{_number(float(psnr(original, reconstruction)))} dB"}
    if min(original.shape[1:]) >= 11:
        numbers["SSIM"] = float(ssim(original, reconstruction))
    return numbers


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return "∞" if value == float("inf") else f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}"
