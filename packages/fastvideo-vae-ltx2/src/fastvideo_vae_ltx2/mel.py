"""Log-mel spectrograms, as LTX-2's audio autoencoder takes them.

Shape legend: B batch, C channels, S samples, T frames, M mel bins, F frequencies.
Source: Lightricks/LTX-2 `ltx_core/model/audio_vae/ops.py`, whose transform is torchaudio's `MelSpectrogram` with
Slaney's scale and norm; the numbers are the same without torchaudio, which is needed only to change the sampling rate.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from fastvideo_vae_core.errors import ShapeError
from fastvideo_vae_core.media.audio import resample

# Samples of a window, and the floor under the logarithm.
WINDOW = 1024
FLOOR = 1e-5


def log_mel(x_BCS: Tensor, sampling_rate: int, *, target_rate: int = 16_000, hop: int = 160, bins: int = 64) -> Tensor:
    """Waveforms (B, C, S) in [-1, 1] to spectrograms (B, C, T, M) of natural logarithms, in the waveforms' type.

    T = 1 + S // hop, of the samples at the target rate: (1, 2, 16000) at 16 kHz -> (1, 2, 101, 64). Frames are centred
    on multiples of the hop, windows that reach beyond the ends see the signal's reflection.

    Raises:
        ShapeError: there are no more samples than half a window, so that nothing can be reflected.
        MediaError: the rate must be changed, and torchaudio (extra `audio`) is not there.
    """
    if x_BCS.ndim != 3:
        raise ShapeError(f"waveforms are (B, C, S), got {tuple(x_BCS.shape)}")
    wide = x_BCS.to(torch.promote_types(x_BCS.dtype, torch.float32))
    wide = resample(wide, sampling_rate, target_rate)
    if wide.shape[-1] <= WINDOW // 2:
        raise ShapeError(
            f"a spectrogram needs more than {WINDOW // 2} samples at {target_rate} Hz, got {wide.shape[-1]}"
        )
    window = torch.hann_window(WINDOW, dtype=wide.dtype, device=wide.device)
    spectrum = torch.stft(
        wide.flatten(0, 1), WINDOW, hop, window=window, center=True, pad_mode="reflect", return_complex=True
    )
    filters = mel_filters(target_rate, WINDOW // 2 + 1, bins).to(wide)
    mel_NTM = spectrum.abs().transpose(1, 2) @ filters
    return mel_NTM.clamp(min=FLOOR).log().unflatten(0, wide.shape[:2]).to(x_BCS.dtype)


@cache
def mel_filters(rate: int, frequencies: int, bins: int) -> Tensor:
    """Triangles (F, M) in float32 on the CPU, each of area one in Hz, between 0 and half the sampling rate."""
    frequency = torch.linspace(0, rate // 2, frequencies)
    edges = _hertz(torch.linspace(0.0, _mel(rate / 2), bins + 2))
    widths = edges.diff()
    slopes = edges[None, :] - frequency[:, None]
    rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    return torch.minimum(rising, falling).clamp(min=0.0) * (2.0 / (edges[2:] - edges[:-2]))


# Slaney's scale: linear below 1 kHz, logarithmic above.
_LINEAR = 200.0 / 3
_KNEE = 1000.0
_STEP = math.log(6.4) / 27.0


def _mel(hertz: float) -> float:
    return hertz / _LINEAR if hertz < _KNEE else _KNEE / _LINEAR + math.log(hertz / _KNEE) / _STEP


def _hertz(mels: Tensor) -> Tensor:
    knee = _KNEE / _LINEAR
    return torch.where(mels < knee, mels * _LINEAR, _KNEE * torch.exp(_STEP * (mels - knee)))
