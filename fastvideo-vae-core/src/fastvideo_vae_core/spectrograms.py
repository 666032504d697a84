"""Spectrograms of a whole recording and of its reconstruction, gathered block by block in constant memory.

C channels, S samples, F bands, T columns of time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastvideo_vae_core.errors import ShapeError

_SIZE, _STEP = 2048, 512
_BANDS = 256
_MOST_COLUMNS = 2048
# Frames that are transformed at a time.
_FRAMES = 512
_LEAST_POWER = 1e-14


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """Mean levels of two signals, in decibels below a sine at full scale.

    original_FT, reconstruction_FT: bands, low ones first, by equal stretches of time.
    edges: between the bands, in Hz, evenly spaced on the mel scale; F + 1 of them.
    seconds: of the recording.
    """

    original_FT: np.ndarray[tuple[int, int], np.dtype[np.float32]]
    reconstruction_FT: np.ndarray[tuple[int, int], np.dtype[np.float32]]
    edges: tuple[float, ...]
    seconds: float


class Spectrograms:
    """Takes a recording and its reconstruction in blocks.

    A column of the picture stands for more and more time as the recording goes on: when there are too many columns,
    each two of them become one. So an hour takes no more memory than ten seconds.
    """

    def __init__(self, sampling_rate: int) -> None:
        self._rate = sampling_rate
        self._window = torch.hann_window(_SIZE)
        self._edges = _mel_edges(sampling_rate)
        self._weights_FB = _band_weights(self._edges, sampling_rate)
        self._held = torch.zeros(2, 1, _SIZE // 2)
        self._samples = 0
        # Sums of `_per` frames to a column, the last one perhaps of fewer.
        self._columns_2FT = torch.zeros(2, _BANDS, 0)
        self._frames, self._per = 0, 1

    def update(self, x_CS: Tensor, y_CS: Tensor) -> None:
        """Take the next block of both, (C, S) each."""
        if x_CS.shape != y_CS.shape or x_CS.ndim != 2:
            shapes = f"{tuple(x_CS.shape)} and {tuple(y_CS.shape)}"
            raise ShapeError(f"spectrograms take two blocks (C, S) of one shape, got {shapes}")
        self._samples += x_CS.shape[1]
        self._take(torch.stack([x_CS, y_CS]).detach().to("cpu", torch.float32))

    def value(self) -> Spectra:
        """The spectra of everything so far; nothing can be added then."""
        self._take(torch.zeros(2, self._held.shape[1], _SIZE))
        counts_T = torch.full(self._columns_2FT.shape[2:], float(self._per))
        counts_T[-1] = self._frames - self._per * (len(counts_T) - 1)
        power = self._columns_2FT / counts_T / (self._window.sum() / 2).square()
        original, reconstruction = (10 * torch.log10(power.clamp(min=_LEAST_POWER))).numpy()
        return Spectra(
            original_FT=original,
            reconstruction_FT=reconstruction,
            edges=tuple(self._edges.tolist()),
            seconds=self._samples / self._rate,
        )

    def _take(self, pair_2CS: Tensor) -> None:
        held = torch.cat([self._held.expand(-1, pair_2CS.shape[1], -1), pair_2CS], -1)
        while (frames := min((held.shape[-1] - _SIZE) // _STEP + 1, _FRAMES)) > 0:
            self._add(self._bands(held[..., : (frames - 1) * _STEP + _SIZE]))
            held = held[..., frames * _STEP :]
        self._held = held.clone()

    def _bands(self, pair_2CS: Tensor) -> Tensor:
        """Power of each band and frame, the mean of the channels: (2, F, T)."""
        spectrum = torch.stft(
            pair_2CS.flatten(0, 1), _SIZE, _STEP, window=self._window, center=False, return_complex=True
        )
        power = spectrum.real.square() + spectrum.imag.square()
        return self._weights_FB @ power.unflatten(0, pair_2CS.shape[:2]).mean(1)

    def _add(self, power_2FT: Tensor) -> None:
        """Add frames to the columns, and halve those when they are too many."""
        begun = self._frames % self._per
        self._frames += power_2FT.shape[2]
        # In front, so that the first frames fill the column that was begun.
        padded = F.pad(power_2FT, (begun, -(begun + power_2FT.shape[2]) % self._per))
        sums = padded.unflatten(2, (-1, self._per)).sum(-1)
        if begun:
            sums[..., 0] += self._columns_2FT[..., -1]
        self._columns_2FT = torch.cat([self._columns_2FT[..., : -1 if begun else None], sums], 2)
        while self._columns_2FT.shape[2] > _MOST_COLUMNS:
            odd = self._columns_2FT.shape[2] % 2
            self._columns_2FT = F.pad(self._columns_2FT, (0, odd)).unflatten(2, (-1, 2)).sum(-1)
            self._per *= 2


def _mel_edges(sampling_rate: int) -> Tensor:
    top = 2595 * math.log10(1 + sampling_rate / 2 / 700)
    return 700 * (10 ** (torch.linspace(0, top, _BANDS + 1, dtype=torch.float64) / 2595) - 1)


def _band_weights(edges: Tensor, sampling_rate: int) -> Tensor:
    """How much of each band lies in each frequency of the transform; every band has some."""
    width = sampling_rate / _SIZE
    low_B = (torch.arange(_SIZE // 2 + 1, dtype=torch.float64) - 0.5) * width
    reach_FB = torch.minimum(edges[1:, None], low_B + width) - torch.maximum(edges[:-1, None], low_B)
    reach_FB = reach_FB.clamp(min=0)
    return (reach_FB / reach_FB.sum(1, keepdim=True)).float()
