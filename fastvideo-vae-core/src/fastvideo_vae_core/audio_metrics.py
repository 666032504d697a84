"""How far reconstructed sound is from its original: SI-SDR and a distance of spectrograms, in plain PyTorch.

B batch, C channels, S samples. Both metrics come as a function of whole signals and as a class that takes them in
blocks, with the same value whatever the blocks and memory for one of them. Sums are taken in float64, on the tensors'
device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvideo_vae_core.errors import ShapeError

# Size of the transform, step and window of each resolution.
_RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
_LEAST_POWER = 1e-8
STFT_LEAST_SAMPLES = max(size for size, _, _ in _RESOLUTIONS) // 2 + 1
# Frames that are transformed at a time.
_FRAMES = 512


def si_sdr(x_BCS: Tensor, y_BCS: Tensor) -> Tensor:
    """Scale-invariant ratio of signal to distortion in dB, (B,): infinite for equal signals; see SISDR.

    Raises:
        ShapeError: the shapes differ, are empty or not (B, C, S).
    Source: Le Roux, Wisdom, Erdogan and Hershey 2019, with means removed as auraloss does.
    """
    metric = SISDR()
    metric.update(x_BCS, y_BCS)
    return metric.value()


def stft_distance(x_BCS: Tensor, y_BCS: Tensor) -> Tensor:
    """Multi-resolution STFT distance, (B,): 0 for equal signals; see STFTDistance.

    Raises:
        ShapeError: the shapes differ, are not (B, C, S), or have less than STFT_LEAST_SAMPLES samples.
    Source: Yamamoto, Song and Kim 2020; resolutions and details are the defaults of auraloss, which Stable Audio's
        papers report.
    """
    metric = STFTDistance()
    metric.update(x_BCS, y_BCS)
    return metric.value()


class SISDR:
    """10 log10(|a x|² / |y - a x|²) with the scale a that brings the original x nearest to y, for each channel.

    The value of an item is the mean over its channels; those whose original is silent have none and are left out.
    """

    def __init__(self) -> None:
        self._samples = 0
        self._sums: Tensor | None = None

    def update(self, x_BCS: Tensor, y_BCS: Tensor) -> None:
        """Take the next block of the original and the reconstruction."""
        x, y = (each.double() for each in _checked(x_BCS, y_BCS))
        e = y - x
        # Of the error, because for good reconstructions sums of y would lose it among their digits.
        sums_5BC = torch.stack([each.sum(-1) for each in (x, e, x * x, e * x, e * e)])
        self._sums = sums_5BC if self._sums is None else self._sums + sums_5BC
        self._samples += x.shape[-1]

    def value(self) -> Tensor:
        """In dB, (B,); NaN where every channel is silent."""
        if self._sums is None:
            raise ShapeError("SI-SDR of no samples; update() takes (B, C, S)")
        x, e, xx, ex, ee = self._sums
        xx, ex, ee = xx - x * x / self._samples, ex - e * x / self._samples, ee - e * e / self._samples
        signal = (xx + ex).square() / xx
        distortion = (ee - ex.square() / xx).clamp(min=0)
        return (10 * torch.log10(signal / distortion)).nanmean(-1)


class STFTDistance:
    """Spectral convergence |X - Y| / |X| of the magnitudes X of the original and Y of the reconstruction, over all
    channels, frequencies and times, plus the mean of |log X - log Y|; averaged over three resolutions."""

    def __init__(self) -> None:
        self._resolutions = [_Resolution(*each) for each in _RESOLUTIONS]

    def update(self, x_BCS: Tensor, y_BCS: Tensor) -> None:
        """Take the next block of the original and the reconstruction."""
        pair_2BCS = torch.stack(_checked(x_BCS, y_BCS)).float()
        for resolution in self._resolutions:
            resolution.update(pair_2BCS)

    def value(self) -> Tensor:
        """Of everything so far, (B,); the metric is done then.

        Raises:
            ShapeError: less than STFT_LEAST_SAMPLES samples came.
        """
        return torch.stack([resolution.value() for resolution in self._resolutions]).mean(0)


class _Resolution:
    """One short-time Fourier transform over blocks, as torch.stft computes it of the whole, mirrored at both ends."""

    def __init__(self, size: int, step: int, window: int) -> None:
        self._size, self._step = size, step
        self._window = F.pad(torch.hann_window(window), ((size - window) // 2, size - window - (size - window) // 2))
        self._held: Tensor | None = None
        self._begun = False
        self._sums: Tensor | None = None
        self._magnitudes = 0

    def update(self, pair_2BCS: Tensor) -> None:
        held = pair_2BCS if self._held is None else torch.cat([self._held, pair_2BCS], -1)
        reach = self._size // 2
        if not self._begun and held.shape[-1] > reach:
            held, self._begun = torch.cat([held[..., 1 : reach + 1].flip(-1), held], -1), True
        # The mirror at the end needs as much of the past.
        self._held = self._transform(held, keep=reach + 1) if self._begun else held

    def value(self) -> Tensor:
        if self._held is None or not self._begun:
            raise ShapeError(f"an STFT distance needs {STFT_LEAST_SAMPLES} samples or more")
        reach = self._size // 2
        mirror = self._held[..., -reach - 1 : -1].flip(-1)
        self._transform(torch.cat([self._held, mirror], -1), keep=0)
        assert self._sums is not None
        gap_BC, power_BC, logarithms_BC = self._sums
        return (gap_BC.sum(-1) / power_BC.sum(-1)).sqrt() + logarithms_BC.mean(-1) / self._magnitudes

    def _transform(self, held: Tensor, keep: int) -> Tensor:
        """Take every whole frame of which the last `keep` samples are not a part of it alone; what is left."""
        frames = (held.shape[-1] - self._size) // self._step + 1
        while frames > 0:
            count = min(frames, _FRAMES, max((held.shape[-1] - keep) // self._step, 0))
            if not count:
                break
            self._add(held[..., : (count - 1) * self._step + self._size])
            held, frames = held[..., count * self._step :], frames - count
        return held.clone()

    def _add(self, pair_2BCS: Tensor) -> None:
        window = self._window = self._window.to(pair_2BCS.device)
        spectrum = torch.stft(
            pair_2BCS.flatten(0, 2), self._size, self._step, window=window, center=False, return_complex=True
        )
        power = (spectrum.real.square() + spectrum.imag.square()).clamp(min=_LEAST_POWER)
        x, y = power.sqrt().unflatten(0, pair_2BCS.shape[:3])
        gap = (y - x).double().square().sum((-1, -2))
        logarithms = (y.log() - x.log()).abs().double().sum((-1, -2))
        sums_3BC = torch.stack([gap, x.double().square().sum((-1, -2)), logarithms])
        self._sums = sums_3BC if self._sums is None else self._sums + sums_3BC
        self._magnitudes += x.shape[-1] * x.shape[-2]


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape or x.ndim != 3 or not x.numel():
        raise ShapeError(f"sound is compared as two (B, C, S) of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    # Apple's GPUs have no float64, so there the sums are done by the CPU.
    return (x.detach().cpu(), y.detach().cpu()) if x.device.type == "mps" else (x.detach(), y.detach())
