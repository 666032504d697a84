"""Metrics against scikit-image and pytorch-msssim, and against what can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import pytorch_msssim
import torch
from skimage.data import astronaut
from skimage.metrics import structural_similarity

from fastvideo_vae_core import metrics
from fastvideo_vae_core.errors import ShapeError
from fastvideo_vae_core.metrics import ms_ssim, per_frame, psnr, ssim


def pair(height: int, width: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x_CHW = torch.from_numpy(astronaut()[:height, :width]).permute(2, 0, 1).double() / 127.5 - 1
    generator = torch.Generator().manual_seed(seed)
    return x_CHW, (x_CHW + noise * torch.randn(x_CHW.shape, generator=generator, dtype=torch.float64)).clamp(-1, 1)


def test_psnr_of_one_level_everywhere() -> None:
    x = torch.zeros(2, 3, 8, 8)
    y = x + torch.tensor([1 / 127.5, 2 / 127.5]).view(2, 1, 1, 1)
    expected = [20 * math.log10(255), 20 * math.log10(255 / 2)]
    assert psnr(x, y).tolist() == pytest.approx(expected, abs=1e-5)
    assert psnr(255 * x, 255 * x + 1, data_range=255).tolist() == pytest.approx([expected[0]] * 2)
    levels = torch.full((3, 4, 4), 7, dtype=torch.uint8)
    assert psnr(levels, levels + 1, data_range=255).tolist() == pytest.approx([expected[0]])


def test_psnr_of_equal_pictures_is_infinite_and_of_a_nan_is_nan() -> None:
    x = torch.zeros(3, 4, 4)
    assert psnr(x, x).tolist() == [math.inf]
    assert psnr(x, x / 0).isnan().all()


def test_psnr_adds_up_small_errors_exactly() -> None:
    """A sum in float32 blurs its small terms: four million errors of 1e-8 beside one of 1."""
    x = torch.zeros(1, 1, 2048, 2048)
    y = torch.full_like(x, 1e-4)
    y[0, 0, 0, 0] = 1.0
    exact = (1 + (x.numel() - 1) * float(torch.tensor(1e-4)) ** 2) / x.numel()
    assert psnr(x, y).item() == pytest.approx(10 * math.log10(4 / exact), abs=1e-9)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (97, 130), (11, 60)])
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_ssim_equals_scikit_image(height: int, width: int, noise: float) -> None:
    x_CHW, y_CHW = pair(height, width, noise)
    _, full = structural_similarity(
        (x_CHW + 1).numpy(),
        (y_CHW + 1).numpy(),
        data_range=2.0,
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    assert ssim(x_CHW, y_CHW).item() == pytest.approx(full[:, 5 : height - 5, 5 : width - 5].mean(), abs=1e-12)
    assert ssim(x_CHW.float(), y_CHW.float()).item() == pytest.approx(ssim(x_CHW, y_CHW).item(), abs=1e-7)


@pytest.mark.parametrize(("height", "width"), [(161, 163), (176, 200)])
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_ms_ssim_equals_pytorch_msssim(height: int, width: int, noise: float) -> None:
    """Its own window is made in float32, and good to 1e-5 only."""
    x_CHW, y_CHW = pair(height, width, noise)
    window = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(3, 1, 1, 11)
    expected = pytorch_msssim.ms_ssim(x_CHW[None] + 1, y_CHW[None] + 1, data_range=2.0, win=window).item()
    assert ms_ssim(x_CHW, y_CHW).item() == pytest.approx(expected, abs=1e-12)


def test_a_picture_has_one_distance_however_it_is_stored() -> None:
    pictures = pair(170, 170, 0.1)
    levels = [127.5 * (each_CHW + 1) for each_CHW in pictures]
    assert psnr(*levels, data_range=255).item() == pytest.approx(psnr(*pictures).item())
    for metric in (ssim, ms_ssim):
        assert metric(*levels, data_range=255, black=0).item() == pytest.approx(metric(*pictures).item(), abs=1e-12)


def test_ms_ssim_of_an_inverted_picture_is_zero_not_nan() -> None:
    x_CHW, _ = pair(161, 161, 0.0)
    assert ms_ssim(x_CHW, -x_CHW).item() == 0


def test_bands_do_not_change_ssim(monkeypatch: pytest.MonkeyPatch) -> None:
    x_CHW, y_CHW = pair(60, 70, 0.1)
    whole = ssim(x_CHW, y_CHW)
    monkeypatch.setattr(metrics, "_BAND", 7 * 3 * 70)
    assert torch.allclose(ssim(x_CHW, y_CHW), whole, rtol=1e-13)


def test_values_belong_to_their_own_picture() -> None:
    x_CHW, y_CHW = pair(170, 170, 0.1)
    x, y = torch.stack([x_CHW, x_CHW, y_CHW]), torch.stack([x_CHW, y_CHW, x_CHW])
    for metric in (psnr, ssim, ms_ssim):
        values = metric(x, y)
        assert values.shape == (3,)
        assert values.dtype == torch.float64
        assert values[0] == (math.inf if metric is psnr else pytest.approx(1))
        assert values[1].item() == pytest.approx(metric(x_CHW, y_CHW).item())
        assert values[2].item() == pytest.approx(values[1].item())
        assert values[1] < values[0]


def test_video() -> None:
    x = torch.zeros(2, 3, 4, 16, 16)
    y = x.clone()
    y[:, :, 1] += 0.1
    y[1, :, 3] += 0.2
    mse = np.array([[0, 0.01, 0, 0], [0, 0.01, 0, 0.04]])
    assert psnr(x, y).tolist() == pytest.approx(10 * np.log10(4 / mse.mean(1)), abs=1e-5)
    frames = per_frame(psnr, x, y)
    assert frames.shape == (2, 4)
    with np.errstate(divide="ignore"):
        assert frames.flatten().tolist() == pytest.approx(10 * np.log10(4 / mse.flatten()), abs=1e-5)
    assert per_frame(ssim, x, y).shape == (2, 4)


def test_shapes_that_cannot_be_compared_are_refused() -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(shape)

    for metric, x, y, reason in [
        (psnr, empty(3, 8, 8), empty(3, 8, 9), "crop one first"),
        (psnr, empty(8, 8), empty(8, 8), r"takes \(B, C, H, W\)"),
        (psnr, empty(3, 0, 8), empty(3, 0, 8), "at least 1 × 1"),
        (ssim, empty(1, 3, 10, 64), empty(1, 3, 10, 64), "at least 11 × 11 pixels, got 10 × 64"),
        (ssim, empty(1, 3, 4, 16, 16), empty(1, 3, 4, 16, 16), "per_frame"),
        (ms_ssim, empty(3, 160, 200), empty(3, 160, 200), "at least 161 × 161 pixels, got 160 × 200"),
    ]:
        with pytest.raises(ShapeError, match=reason):
            metric(x, y)
    with pytest.raises(ShapeError, match=r"x\[None\]"):
        per_frame(psnr, empty(3, 4, 8, 8), empty(3, 4, 8, 8))
