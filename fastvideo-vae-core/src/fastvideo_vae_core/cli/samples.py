"""What the commands do differently for each kind of media. One that is not in the table is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastvideo_vae_core.errors import FamilyError, MediaError
from fastvideo_vae_core.family import Media
from fastvideo_vae_core.media import media_kind
from fastvideo_vae_core.media.files import readable
from fastvideo_vae_core.media.images import read_image, write_image
from fastvideo_vae_core.metrics import MS_SSIM_LEAST_SIDE, ms_ssim, psnr, ssim
from fastvideo_vae_core.report import comparison_figure


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The content of one file: x (1, C, ...) in [-1, 1], and the rate of its axis of time."""

    x: Tensor
    frame_rate: str | None = None
    sampling_rate: int | None = None


@dataclass(frozen=True, kw_only=True)
class Medium:
    """One kind of media.

    Attributes:
        suffix: of a file whose name we choose.
        writable: suffixes that can be written.
        read: a file to a sample.
        write: a sample to a file, whole or not at all.
        measure: what a reconstruction lost against its original, both (1, C, ...): name of the metric -> value.
        compare: writes the picture that shows it, with a title and the metrics as people read them.
        noun: what the shipped example is.
    """

    media: Media
    suffix: str
    writable: tuple[str, ...]
    read: Callable[[Path], Sample]
    write: Callable[[Path, Sample], None]
    measure: Callable[[Tensor, Tensor], dict[str, float]]
    compare: Callable[[Path, Tensor, Tensor, str, Mapping[str, str]], None]
    noun: str


def medium_of(media: Media) -> Medium:
    """How to handle that kind of media.

    Raises:
        FamilyError: the command line does not handle it.
    """
    if media not in _MEDIA:
        known = " and ".join(_MEDIA)
        raise FamilyError(f"the command line takes {known} so far, not {media}; load the family from Python instead")
    return _MEDIA[media]


def common_media(paths: Sequence[Path]) -> Media:
    """The kind of media that all these files hold, by their suffixes.

    Raises:
        MediaError: a file cannot be read, or they are of several kinds.
    """
    kinds = {media_kind(readable(path)): path for path in paths}
    if len(kinds) > 1:
        told = " and ".join(f"{path} ({kind})" for kind, path in kinds.items())
        raise MediaError(f"one call takes one kind of media, got {told}")
    return next(iter(kinds))


def _read_picture(path: Path) -> Sample:
    return Sample(x=read_image(path).unsqueeze(0))


def _write_picture(path: Path, sample: Sample) -> None:
    write_image(path, sample.x[0])


def _measure_pictures(x: Tensor, y: Tensor) -> dict[str, float]:
    """The metrics that a picture of that size has."""
    least, metrics = min(x.shape[-2:]), {"psnr": psnr(x, y)}
    if least >= _SSIM_LEAST_SIDE:
        metrics["ssim"] = ssim(x, y)
    if least >= MS_SSIM_LEAST_SIDE:
        metrics["ms_ssim"] = ms_ssim(x, y)
    return {name: value.item() for name, value in metrics.items()}


def _compare_pictures(path: Path, x: Tensor, y: Tensor, title: str, numbers: Mapping[str, str]) -> None:
    comparison_figure(path, x[0], y[0], title=title, metrics=numbers)


# One window.
_SSIM_LEAST_SIDE = 11

_MEDIA: dict[Media, Medium] = {
    "image": Medium(
        media="image",
        suffix=".png",
        writable=(".png", ".jpg", ".jpeg", ".webp"),
        read=_read_picture,
        write=_write_picture,
        measure=_measure_pictures,
        compare=_compare_pictures,
        noun="photograph",
    ),
}
