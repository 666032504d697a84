"""Photographs and pictures as tensors.

C channels (red, green, blue), H height, W width. Samples are display values (sRGB) in [-1, 1].
"""

from __future__ import annotations

import os
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvideo_vae_core.errors import MediaError, ShapeError
from fastvideo_vae_core.finite import is_finite
from fastvideo_vae_core.media.files import atomic_output, ffmpeg_errors, readable, require

_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "lossless": True},
}

_ORIENTATION_TAG = 0x0112
# EXIF orientation -> mirror left to right first, then turn by so many quarters counter-clockwise.
_ORIENTATIONS = {
    2: (True, 0),
    3: (False, 2),
    4: (True, 2),
    5: (True, 1),
    6: (False, 3),
    7: (True, 3),
    8: (False, 1),
}


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read a picture as it is meant to be seen.

    float32 (3, H, W) in [-1, 1]; an 8-bit value v is v / 127.5 - 1. A JPEG of 4032 × 3024 whose EXIF says "turn by a
    quarter" comes as (3, 4032, 3024). The orientation is applied, transparency is laid over white, palettes, grey and
    CMYK become RGB, 16-bit greyscale and 16-bit PNG keep their precision, and an embedded ICC profile is converted to
    sRGB (in 8 bits; a profile that does not fit its picture is ignored with a warning). An animation gives its first
    frame.

    Raises:
        MediaError: the file is missing, truncated, not an image, of more pixels than Pillow deems safe, or of
            samples without a known white (32-bit integers, floats).
    """
    image_module: Any = require("PIL.Image", "media")
    source = readable(path)
    try:
        with image_module.open(source) as image:
            array_HWC = _samples(image, source)
            array_HWC = _orient(array_HWC, image.getexif().get(_ORIENTATION_TAG, 1))
    except MediaError:
        raise
    except image_module.UnidentifiedImageError as error:
        raise MediaError(f"{path} is not an image in a format that Pillow reads") from error
    except image_module.DecompressionBombError as error:
        raise MediaError(f"{path} has more pixels than is safe to decode: {error}") from error
    except Exception as error:  # Pillow's decoders raise whatever the malformed bytes led to, not one family of errors
        raise MediaError(f"{path} cannot be read as an image: {error}") from error
    return from_uint8(torch.from_numpy(array_HWC.transpose(2, 0, 1).copy()))


def write_image(path: str | os.PathLike[str], x_CHW: Tensor) -> None:
    """Write (3, H, W) in [-1, 1] as PNG, JPEG (quality 95, chroma at full resolution) or lossless WebP, by the suffix.

    Values become 8 bits by `to_uint8`. The file is whole or absent.

    Raises:
        ShapeError: not (3, H, W) with at least one pixel.
        MediaError: an unknown suffix, a NaN or an infinity, a size beyond the format's, or an unwritable path.
    """
    image_module: Any = require("PIL.Image", "media")
    options = _SAVE_OPTIONS.get(Path(path).suffix.lower())
    if options is None:
        raise MediaError(f"{path}: pictures are written as {' '.join(_SAVE_OPTIONS)}; choose one of these suffixes")
    if x_CHW.ndim != 3 or x_CHW.shape[0] != 3 or x_CHW.numel() == 0:
        raise ShapeError(f"a picture is (3, H, W), got {tuple(x_CHW.shape)}; pass one picture of a batch, x[0]")
    require_finite(x_CHW, path)
    with atomic_output(path) as temporary:
        try:
            image_module.fromarray(to_uint8(x_CHW).permute(1, 2, 0).cpu().numpy()).save(temporary, **options)
        except (OSError, ValueError) as error:
            raise MediaError(f"cannot write {path}: {error}") from error


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 8-bit levels, round((x + 1) * 127.5) clamped to 0..255, on the tensor's device, in any layout."""
    return x.detach().to(torch.float32).add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def from_uint8(levels: Tensor) -> Tensor:
    """8-bit levels, whole or in between, to float32 in [-1, 1]: v / 127.5 - 1, which `to_uint8` inverts exactly."""
    return levels.to(torch.float32, copy=True).div_(127.5).sub_(1)


def require_finite(x: Tensor, path: str | os.PathLike[str]) -> None:
    """Refuse to write NaN or infinity, which every format would turn into some innocent-looking value."""
    if not is_finite(x):
        bad = int((~torch.isfinite(x)).sum())
        raise MediaError(f"cannot write {path}: {bad} of {x.numel()} values are not finite; decode in a wider dtype")


def _samples(image: Any, source: Path) -> np.ndarray[Any, Any]:
    """An opened picture -> (H, W, 3) RGB in 0..255: uint8, or float32 where the file says more than 8 bits do."""
    profile = image.info.get("icc_profile")
    raw_mode = str(image.tile[0][3]) if image.format == "PNG" and image.tile else ""
    image.load()
    if raw_mode.endswith(";16B") and image.mode in ("RGB", "RGBA", "LA") and not profile:
        return _png_16_bit(source)
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_16_bit(np.asarray(image), source)
    if not image.has_transparency_data:
        return np.asarray(_srgb(image, profile, source))
    rgba = image.convert("RGBA")
    opaque = image.getchannel("L") if image.mode == "LA" else rgba.convert("RGB")
    alpha_HW1 = np.asarray(rgba.getchannel("A"), dtype=np.float32)[..., None] / 255
    return _over_white(np.asarray(_srgb(opaque, profile, source)), alpha_HW1)


def _grey_16_bit(grey_HW: np.ndarray[Any, Any], source: Path) -> np.ndarray[Any, Any]:
    if grey_HW.dtype.kind == "f" or grey_HW.min() < 0 or grey_HW.max() > 65535:
        raise MediaError(f"{source} has {grey_HW.dtype} samples without a known white; convert it to 8 or 16 bits")
    return np.repeat((grey_HW.astype(np.float32) / 257)[..., None], 3, axis=2)


def _png_16_bit(source: Path) -> np.ndarray[Any, Any]:
    """Pillow drops the low byte of 16-bit colour, FFmpeg keeps it."""
    av: Any = require("av", "media")
    with ffmpeg_errors(source, "read"), av.open(str(source)) as container:
        frame = next(container.decode(video=0))
    channels = len(frame.format.components)
    rows = np.frombuffer(frame.planes[0], dtype=">u2").reshape(frame.height, -1)
    used = rows[:, : frame.width * channels].reshape(frame.height, frame.width, channels)
    levels_HWC: np.ndarray[Any, Any] = used.astype(np.float32) / 257
    color_HWC = levels_HWC if channels == 3 else levels_HWC[..., : channels - 1]
    rgb_HWC: np.ndarray[Any, Any] = np.broadcast_to(color_HWC, (frame.height, frame.width, 3))
    return rgb_HWC if channels == 3 else _over_white(rgb_HWC, levels_HWC[..., -1:] / 255)


def _over_white(rgb_HWC: np.ndarray[Any, Any], alpha_HW1: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    blended_HWC: np.ndarray[Any, Any] = rgb_HWC.astype(np.float32) * alpha_HW1 + 255 * (1 - alpha_HW1)
    return blended_HWC


def _srgb(image: Any, profile: bytes | None, source: Path) -> Any:
    """Convert through the embedded profile when there is one that fits and is not sRGB already."""
    if not profile:
        return image.convert("RGB")
    cms: Any = require("PIL.ImageCms", "media")
    try:
        embedded = cms.ImageCmsProfile(BytesIO(profile))
        if cms.getProfileDescription(embedded).startswith("sRGB"):
            return image.convert("RGB")
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}[embedded.profile.xcolor_space.strip()]
        matching = image if image.mode == mode or mode != "RGB" else image.convert("RGB")
        return cms.profileToProfile(matching, embedded, cms.createProfile("sRGB"), outputMode="RGB")
    except (KeyError, OSError, cms.PyCMSError) as error:
        warnings.warn(f"{source}: its colour profile does not fit and is ignored ({error})", stacklevel=4)
        return image.convert("RGB")


def _orient(array_HWC: np.ndarray[Any, Any], orientation: int) -> np.ndarray[Any, Any]:
    """Turn stored rows and columns into what the camera saw; EXIF counts eight orientations from 1."""
    mirrored, turns = _ORIENTATIONS.get(orientation, (False, 0))
    upright_HWC: np.ndarray[Any, Any] = np.rot90(array_HWC[:, ::-1] if mirrored else array_HWC, turns)
    return upright_HWC
