"""Metrics of sound against their definitions, whole and in blocks; and spectrograms in constant memory."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastvideo_vae_core.audio_metrics import SISDR, STFT_LEAST_SAMPLES, STFTDistance, si_sdr, stft_distance
from fastvideo_vae_core.errors import MediaError, ShapeError
from fastvideo_vae_core.media import read_image
from fastvideo_vae_core.report import spectrogram_figure
from fastvideo_vae_core.spectrograms import Spectrograms

RATE = 16_000


def pair(samples: int, channels: int = 2) -> tuple[Tensor, Tensor]:
    """A signal and a copy that is quieter, shifted and noisy."""
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(2, channels, samples, generator=generator).cumsum(-1) / 50
    return x, 0.8 * x + 0.05 * torch.randn(x.shape, generator=generator) + 0.1


def blocks(x: Tensor, size: int) -> tuple[Tensor, ...]:
    return x.split(size, -1)


# -------------------------------------------------------------------- SI-SDR


def test_si_sdr_is_its_definition() -> None:
    x, y = pair(5000)
    values = []
    for a, b in zip(x.flatten(0, 1).double().numpy(), y.flatten(0, 1).double().numpy(), strict=True):
        a, b = a - a.mean(), b - b.mean()
        target = a * (a @ b) / (a @ a)
        values.append(10 * math.log10((target @ target) / ((b - target) @ (b - target))))
    expected = torch.tensor(values, dtype=torch.float64).view(2, 2).mean(1)
    torch.testing.assert_close(si_sdr(x, y), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("decibels", [0, 20, 60, 100])
def test_si_sdr_of_noise_at_a_known_level(decibels: int) -> None:
    t = torch.arange(RATE, dtype=torch.float64) / RATE
    x, noise = (torch.sin(2 * torch.pi * hertz * t).view(1, 1, -1) for hertz in (440, 1000))
    y = 3 * (x + noise * 10 ** (-decibels / 20))
    assert si_sdr(x, y).item() == pytest.approx(decibels, abs=1e-6)


def test_si_sdr_of_equal_opposite_and_silent_signals() -> None:
    x, y = pair(1000)
    assert si_sdr(x, x).tolist() == [math.inf] * 2
    assert si_sdr(x, 2 * x).min() > 120
    silent = x.clone()
    silent[:, 1] = 0
    # The channel that says nothing is left out.
    assert torch.equal(si_sdr(silent, y), si_sdr(x[:, :1], y[:, :1]))
    assert si_sdr(0 * x, x).isnan().all()


# -------------------------------------------------------------------- STFT distance


def test_stft_distance_is_its_definition() -> None:
    x, y = pair(4000)
    expected = torch.zeros(2)
    for size, step, window in ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240)):
        for item in range(2):
            magnitudes = []
            for signal in (x[item], y[item]):
                spectrum = torch.stft(signal, size, step, window, torch.hann_window(window), return_complex=True)
                magnitudes.append((spectrum.real**2 + spectrum.imag**2).clamp(min=1e-8).sqrt())
            a, b = magnitudes
            expected[item] += ((a - b).norm() / a.norm() + (a.log() - b.log()).abs().mean()) / 3
    torch.testing.assert_close(stft_distance(x, y).float(), expected, rtol=1e-5, atol=0)


def test_equal_signals_have_no_distance() -> None:
    x, y = pair(3000)
    assert stft_distance(x, x).tolist() == [0, 0]
    assert (stft_distance(x, y) > stft_distance(x, x + (y - x) / 10)).all()


# -------------------------------------------------------------------- both


@pytest.mark.parametrize(
    ("samples", "size"),
    [(STFT_LEAST_SAMPLES, 7), (1400, 700), (1400, 1025), (6000, 700), (6000, 1025), (6000, 5000), (150_000, 70_000)],
)
def test_blocks_do_not_show(samples: int, size: int) -> None:
    x, y = pair(samples)
    ratio, distance = SISDR(), STFTDistance()
    for a, b in zip(blocks(x, size), blocks(y, size), strict=True):
        ratio.update(a, b)
        distance.update(a, b)
    torch.testing.assert_close(ratio.value(), si_sdr(x, y), rtol=0, atol=1e-9)
    # Sums of float32 magnitudes, frame by frame the same.
    torch.testing.assert_close(distance.value(), stft_distance(x, y), rtol=1e-6, atol=0)


def test_what_cannot_be_compared_is_refused() -> None:
    x, y = pair(3000)
    for metric in (si_sdr, stft_distance):
        for a, b in ((x, y[..., :-1]), (x[0], y[0]), (x[..., :0], y[..., :0])):
            with pytest.raises(ShapeError, match="one shape"):
                metric(a, b)
    with pytest.raises(ShapeError, match="1025 samples or more"):
        stft_distance(x[..., :1024], y[..., :1024])
    with pytest.raises(ShapeError, match="no samples"):
        SISDR().value()
    with pytest.raises(ShapeError, match="1025 samples or more"):
        STFTDistance().value()


# -------------------------------------------------------------------- spectrograms


def tone(hertz: float, seconds: float, amplitude: float = 0.5) -> Tensor:
    t = torch.arange(int(seconds * RATE), dtype=torch.float64) / RATE
    return (amplitude * torch.sin(2 * torch.pi * hertz * t)).float().expand(2, -1)


@pytest.mark.parametrize("hertz", [200, 1000, 6000])
def test_a_tone_stands_in_its_band(hertz: float) -> None:
    spectrograms = Spectrograms(RATE)
    spectrograms.update(tone(hertz, 1), tone(hertz, 1, 0.05))
    spectra = spectrograms.value()
    middle = spectra.original_FT.shape[1] // 2
    band = int(spectra.original_FT[:, middle].argmax())
    # One frequency of the transform, 8 Hz, to either side.
    assert spectra.edges[band] - 8 <= hertz <= spectra.edges[band + 1] + 8
    difference = spectra.original_FT[band] - spectra.reconstruction_FT[band]
    assert difference[4:-4] == pytest.approx(20, abs=0.01)
    assert spectra.seconds == 1


def test_columns_are_few_however_long_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvideo_vae_core.spectrograms._MOST_COLUMNS", 64)
    generator = torch.Generator().manual_seed(0)
    loud = torch.cat([tone(1000, 10), 0.1 * tone(1000, 10), torch.zeros(2, 10 * RATE)], 1)
    loud += 1e-5 * torch.randn(loud.shape, generator=generator)
    whole, parts = Spectrograms(RATE), Spectrograms(RATE)
    whole.update(loud, loud)
    for block in blocks(loud, 7001):
        parts.update(block, block)
        assert parts._columns_2FT.shape[2] <= 64
        assert parts._held.shape[-1] < 4096
    a, b = whole.value(), parts.value()
    assert 32 <= a.original_FT.shape[1] <= 64
    np.testing.assert_allclose(a.original_FT, b.original_FT, atol=0.01)
    # Mean levels, also where columns are made of many frames and the last one of few.
    levels = a.original_FT.max(0)
    third = len(levels) // 3
    assert levels[2] - levels[third + 2] == pytest.approx(20, abs=0.1)
    assert levels[-2] < -80


def test_the_figure_shows_three_panels(tmp_path: Path) -> None:
    spectrograms = Spectrograms(RATE)
    spectrograms.update(tone(1000, 2), tone(1000, 2, 0.05))
    spectra = spectrograms.value()
    spectrogram_figure(tmp_path / "figure.png", spectra, title="a title", metrics={"SI-SDR": "20 dB"})
    picture = read_image(tmp_path / "figure.png")
    assert picture.shape[2] > 1000
    # The tone is as bright as the scale allows, and 20 dB below that in the copy: red in the difference is its blue.
    assert picture.std() > 0.3
    with pytest.raises(MediaError, match=r"\.png"):
        spectrogram_figure(tmp_path / "figure.jpg", spectra)
    with pytest.raises(ShapeError, match="of one shape"):
        Spectrograms(RATE).update(tone(1000, 1), tone(1000, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
