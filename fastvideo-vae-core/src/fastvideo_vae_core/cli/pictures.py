"""Pictures: one piece, in one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from fastvideo_vae_core.cli.samples import Facts, Judge, Medium, Reading, Sink, Source, Writing
from fastvideo_vae_core.media.images import read_image, write_image
from fastvideo_vae_core.metrics import MS_SSIM_LEAST_SIDE, SSIM_LEAST_SIDE, ms_ssim, psnr, ssim
from fastvideo_vae_core.report import comparison_figure


class PictureSource:
    """One picture."""

    facts = Facts()

    def __init__(self, path: Path, reading: Reading) -> None:
        self._x = read_image(path).unsqueeze(0).to(reading.device)
        self.shape = tuple(self._x.shape)
        self.expected: int | None = None
        self.notes: list[str] = []

    def read(self, count: int) -> Tensor:
        x, self._x = self._x, self._x[:, :, :0]
        return x


class PictureSink:
    """One picture, written when it comes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.notes: list[str] = []

    def write(self, y: Tensor) -> None:
        write_image(self._path, y[0])


class PictureJudge:
    """PSNR, SSIM and MS-SSIM, as far as the picture is large enough for them."""

    def __init__(self, facts: Facts) -> None:
        self._pair: tuple[Tensor, Tensor]

    def update(self, x: Tensor, y: Tensor) -> None:
        self._pair = x, y

    def metrics(self) -> dict[str, float]:
        x, y = self._pair
        least, metrics = min(x.shape[-2:]), {"psnr": psnr(x, y)}
        if least >= SSIM_LEAST_SIDE:
            metrics["ssim"] = ssim(x, y)
        if least >= MS_SSIM_LEAST_SIDE:
            metrics["ms_ssim"] = ms_ssim(x, y)
        return {name: value.item() for name, value in metrics.items()}

    def compare(self, path: Path, title: str, numbers: Mapping[str, str]) -> None:
        comparison_figure(path, self._pair[0][0], self._pair[1][0], title=title, metrics=numbers)


@contextmanager
def _open(path: Path, reading: Reading) -> Iterator[Source]:
    yield PictureSource(path, reading)


@contextmanager
def _create(path: Path, facts: Facts, shape: Sequence[int], writing: Writing) -> Iterator[Sink]:
    yield PictureSink(path)


def _judge(facts: Facts) -> Judge:
    return PictureJudge(facts)


PICTURES = Medium(
    media="image",
    suffix=".png",
    writable=(".png", ".jpg", ".jpeg", ".webp"),
    open=_open,
    create=_create,
    judge=_judge,
    noun="photograph",
)
