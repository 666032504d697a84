"""How far a reconstruction is from its original: PSNR, SSIM and MS-SSIM, in plain PyTorch on the tensors' device.

B batch, C channels, T frames, H height, W width, b scales. Every metric takes (B, C, H, W) or one (C, H, W), gives one
float64 value per picture, (B,), and accumulates in float64. `data_range` is the distance from `black` to white: 2 from
-1 for samples in [-1, 1], 255 from 0 for 8-bit levels. SSIM compares brightness above black, so that a picture has one
SSIM however it is stored. One clip without a batch axis would pass for a batch: give it one, x[None].
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvideo_vae_core.errors import ShapeError

_TAPS, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03
SSIM_LEAST_SIDE = _TAPS
_BAND = 1 << 18  # samples of a band of rows
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# The coarsest of the five scales has to hold one window: sides are halved, rounding up, four times.
MS_SSIM_LEAST_SIDE = (_TAPS - 1) * 2 ** (len(_SCALE_WEIGHTS) - 1) + 1


class Metric(Protocol):
    def __call__(self, x_BCHW: Tensor, y_BCHW: Tensor, *, data_range: float = ...) -> Tensor: ...


def psnr(x_BCHW: Tensor, y_BCHW: Tensor, *, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(data_range² / mean squared error); infinite for equal pictures.

    Of a video (B, C, T, H, W), one value per clip, from the error over all its frames (frame by frame: `per_frame`).
    An error of one 8-bit level everywhere is 48.13 dB.

    Raises:
        ShapeError: the shapes differ, are empty, or are not pictures or videos.
    """
    return 10 * torch.log10(data_range**2 / squared_error(x_BCHW, y_BCHW))


def squared_error(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Mean squared error, of pictures and videos as in `psnr`; those of equal parts of a video average to its own.

    Raises:
        ShapeError: as `psnr`.
    """
    x, y = _batched(x_BCHW, y_BCHW, video=True)
    return torch.stack([_squared_error(a, b) for a, b in zip(x, y, strict=True)])


def ssim(x_BCHW: Tensor, y_BCHW: Tensor, *, data_range: float = 2.0, black: float = -1.0) -> Tensor:
    """Structural similarity, 1 for equal pictures: Gaussian window of 11 taps and sigma 1.5, K1 0.01, K2 0.03.

    The mean over channels and over every window that lies wholly inside the picture, with population covariances.

    Raises:
        ShapeError: the shapes differ or are not pictures, or a side is below 11.
    Source: Wang, Bovik, Sheikh and Simoncelli 2004.
    """
    x, y = _batched(x_BCHW, y_BCHW, least_side=_TAPS, name="SSIM")
    return torch.stack([_similarity(a, b, data_range, black)[0].mean() for a, b in zip(x, y, strict=True)])


def ms_ssim(x_BCHW: Tensor, y_BCHW: Tensor, *, data_range: float = 2.0, black: float = -1.0) -> Tensor:
    """SSIM over five scales, each half the one before, with the published weights.

    Contrast and structure count at every scale, luminance at the coarsest; negative values count as 0. Odd sides are
    padded by one black row or column at either end before they are halved, as pytorch-msssim does.

    Raises:
        ShapeError: the shapes differ or are not pictures, or a side is below 161.
    Source: Wang, Simoncelli and Bovik 2003.
    """
    x, y = _batched(x_BCHW, y_BCHW, least_side=MS_SSIM_LEAST_SIDE, name="MS-SSIM")
    pairs = ((_float64(a) - black, _float64(b) - black) for a, b in zip(x, y, strict=True))
    return torch.stack([_multi_scale(a, b, data_range).mean() for a, b in pairs])


def per_frame(metric: Metric, x_BCTHW: Tensor, y_BCTHW: Tensor, *, data_range: float = 2.0) -> Tensor:
    """A metric of pictures for every frame of a video: (B, C, T, H, W) -> (B, T), one frame at a time in memory."""
    if x_BCTHW.ndim != 5:
        raise ShapeError(f"per_frame takes (B, C, T, H, W), got {tuple(x_BCTHW.shape)}; add a batch axis with x[None]")
    x, y = _batched(x_BCTHW, y_BCTHW, name="per_frame", video=True)
    frames = zip(x.unbind(2), y.unbind(2), strict=True)
    return torch.stack([metric(a_BCHW, b_BCHW, data_range=data_range) for a_BCHW, b_BCHW in frames], dim=1)


def _squared_error(x: Tensor, y: Tensor) -> Tensor:
    """The mean over one picture, or over one clip (C, T, H, W) with the memory of one frame."""
    if x.ndim == 4:
        frames = zip(x.unbind(1), y.unbind(1), strict=True)
        return torch.stack([_squared_error(a_CHW, b_CHW) for a_CHW, b_CHW in frames]).mean()
    return (_float64(x) - _float64(y)).square().mean()


def _multi_scale(x_CHW: Tensor, y_CHW: Tensor, data_range: float) -> Tensor:
    """One value per channel."""
    product_C = torch.ones(x_CHW.shape[0], dtype=torch.float64, device=x_CHW.device)
    for b, weight in enumerate(_SCALE_WEIGHTS):
        if b:
            x_CHW, y_CHW = _halved(x_CHW), _halved(y_CHW)
        whole_C, contrast_C = _similarity(x_CHW, y_CHW, data_range, 0.0)
        factor_C = whole_C if b == len(_SCALE_WEIGHTS) - 1 else contrast_C
        product_C *= factor_C.clamp(min=0) ** weight
    return product_C


def _similarity(x_CHW: Tensor, y_CHW: Tensor, data_range: float, black: float) -> tuple[Tensor, Tensor]:
    """Per channel, the mean SSIM over every window inside the picture, and that of its contrast and structure alone.

    In bands of rows, which keep the dozen float64 maps small: several times faster on a CPU, and no limit on the size.
    """
    rows, columns = x_CHW.shape[1] - _TAPS + 1, x_CHW.shape[2] - _TAPS + 1
    step = max(_BAND // x_CHW[:, 0].numel(), 1)
    sums_2C = torch.zeros(2, x_CHW.shape[0], dtype=torch.float64, device=_float64(x_CHW[:, :1]).device)
    for top in range(0, rows, step):
        band = slice(top, min(top + step, rows) + _TAPS - 1)
        x_band, y_band = _float64(x_CHW[:, band]) - black, _float64(y_CHW[:, band]) - black
        maps_2CHW = _similarity_maps(x_band, y_band, data_range)
        sums_2C += maps_2CHW.sum((2, 3))
    whole_C, contrast_C = sums_2C / (rows * columns)
    return whole_C, contrast_C


def _similarity_maps(x_CHW: Tensor, y_CHW: Tensor, data_range: float) -> Tensor:
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    moments = torch.stack([x_CHW, y_CHW, x_CHW * x_CHW, y_CHW * y_CHW, x_CHW * y_CHW])
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _windowed(moments)
    xx, yy, xy = mean_x * mean_x, mean_y * mean_y, mean_x * mean_y
    contrast = (2 * (mean_xy - xy) + c2) / (mean_xx - xx + mean_yy - yy + c2)
    return torch.stack([contrast * (2 * xy + c1) / (xx + yy + c1), contrast])


def _windowed(x: Tensor) -> Tensor:
    """The Gaussian mean over every window inside (..., H, W): shifted sums, ten times faster than a float64 conv2d."""
    weights = [math.exp(-((tap - _TAPS // 2) ** 2) / (2 * _SIGMA**2)) for tap in range(_TAPS)]
    for axis in (-2, -1):
        length = x.shape[axis] - _TAPS + 1
        mean = torch.zeros_like(x.narrow(axis, 0, length))
        for tap, weight in enumerate(weights):
            mean.add_(x.narrow(axis, tap, length), alpha=weight / sum(weights))
        x = mean
    return x


def _halved(x_CHW: Tensor) -> Tensor:
    return F.avg_pool2d(x_CHW, 2, padding=[side % 2 for side in x_CHW.shape[1:]])


def _float64(x: Tensor) -> Tensor:
    """Apple's GPUs have no float64, so there the sums are done by the CPU."""
    return x.detach().cpu().double() if x.device.type == "mps" else x.detach().double()


def _batched(
    x: Tensor, y: Tensor, *, least_side: int = 1, name: str = "PSNR", video: bool = False
) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape:
        raise ShapeError(f"{name} compares equal shapes, got {tuple(x.shape)} and {tuple(y.shape)}; crop one first")
    if x.ndim not in ((3, 4, 5) if video else (3, 4)):
        wanted = "(B, C, H, W), (C, H, W)" + (" or (B, C, T, H, W)" if video else "; for video use per_frame")
        raise ShapeError(f"{name} takes {wanted}, got {tuple(x.shape)}")
    if min(x.shape) < 1 or min(x.shape[-2:]) < least_side:
        height, width = x.shape[-2:]
        raise ShapeError(f"{name} needs at least {least_side} × {least_side} pixels, got {height} × {width}")
    return (x[None], y[None]) if x.ndim == 3 else (x, y)
