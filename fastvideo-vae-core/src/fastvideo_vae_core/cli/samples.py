"""What the commands need of each kind of media, as protocols; pictures.py, clips.py and sounds.py give it.

Samples are (1, C, ...). Media that go on in time do so along axis 2 and come in pieces; a picture is one piece.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fastvideo_vae_core.cli.console import sizes
from fastvideo_vae_core.errors import MediaError
from fastvideo_vae_core.family import Media, load_object
from fastvideo_vae_core.latents import LatentInfo
from fastvideo_vae_core.media import ColorTags, media_kind
from fastvideo_vae_core.media.files import readable


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a file says beside its samples."""

    frame_rate: Fraction | None = None
    sampling_rate: int | None = None
    pixel_aspect: Fraction = Fraction(1)
    color: ColorTags | None = None

    @classmethod
    def of(cls, info: LatentInfo) -> Facts:
        """What a latent file says of the file that it was made from.

        Raises:
            MediaError: a rate or an aspect is no positive number.
        """
        try:
            color = None if info.color is None else ColorTags(**{**_UNTAGGED, **info.color})
            rate = None if info.frame_rate is None else Fraction(info.frame_rate)
            facts = cls(
                frame_rate=rate,
                sampling_rate=info.sampling_rate,
                pixel_aspect=Fraction(info.pixel_aspect or 1),
                color=color,
            )
            if facts.pixel_aspect <= 0 or any(rate is not None and rate <= 0 for rate in facts.rates):
                raise ValueError(f"rates {facts.rates}, pixels {facts.pixel_aspect}")
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise MediaError(f"the latents say nonsense of their media ({error}); make them again") from None
        return facts

    @property
    def rates(self) -> tuple[Fraction | int | None, ...]:
        return self.frame_rate, self.sampling_rate

    def entries(self) -> dict[str, Any]:
        """As fields of LatentInfo, which are what JSON knows."""
        color = {} if self.color is None else {name: tag for name, tag in vars(self.color).items() if tag is not None}
        return {
            "frame_rate": None if self.frame_rate is None else str(self.frame_rate),
            "sampling_rate": self.sampling_rate,
            "pixel_aspect": None if self.pixel_aspect == 1 else str(self.pixel_aspect),
            "color": color or None,
        }

    def describe(self, shape: Sequence[int]) -> str:
        """Samples of that shape, for people."""
        size = sizes(shape[1:])
        if self.frame_rate is not None:
            return f"{size} ({float(shape[2] / self.frame_rate):.2f} s at {float(self.frame_rate):.5g} frames a second)"
        if self.sampling_rate is not None:
            return f"{size} ({shape[2] / self.sampling_rate:.2f} s at {self.sampling_rate} Hz)"
        return size


_UNTAGGED: dict[str, str | None] = {"matrix": None, "range": None, "primaries": None, "transfer": None}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a model takes.

    Attributes:
        device: where samples are wanted.
        channels: of its samples.
        sampling_rate: of its sound; None where it takes any.
        downmix: whether sound of more channels may be mixed down.
    """

    device: torch.device
    channels: int
    sampling_rate: int | None
    downmix: bool


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How the options want media written.

    Attributes:
        crf: quality of video.
        sound: a file whose sound goes with the pictures.
    """

    crf: int = 16
    sound: Path | None = None

    @classmethod
    def of(cls, options: argparse.Namespace, sound: Path | None) -> Writing:
        return cls(sound=sound) if options.crf is None else cls(crf=options.crf, sound=sound)


class Source(Protocol):
    """A file that is being read.

    Attributes:
        facts: what it says beside its samples.
        shape: (1, C, ...) of what has been read; 0 along axis 2 before the first read, where media go on in time.
        expected: length along axis 2 in the end, if the file says it.
        notes: what was done to its samples, for people.
    """

    facts: Facts
    expected: int | None
    notes: list[str]

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, count: int) -> Tensor:
        """The next (1, C, count, ...) in [-1, 1]; fewer at the end, and none after it. A picture comes whole."""


class Sink(Protocol):
    """A file that is being written, whole or not at all.

    Attributes:
        notes: what the file could not hold, for people; complete when it is closed.
    """

    notes: list[str]

    def write(self, y: Tensor) -> None:
        """Append (1, C, ...)."""


class Judge(Protocol):
    """Looks at an original and its reconstruction piece by piece."""

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take the next piece of both, (1, C, ...) in [-1, 1]."""

    def metrics(self) -> dict[str, float]:
        """What was lost: name of the metric -> value. At the end, once."""

    def compare(self, path: Path, title: str, numbers: Mapping[str, str]) -> None:
        """Write the picture that shows it, behind `metrics`."""


@dataclass(frozen=True, kw_only=True)
class Medium:
    """One kind of media.

    Attributes:
        suffix: of a file whose name we choose.
        writable: suffixes that can be written.
        open: a file to read, for a model.
        create: a file to write, of samples (1, C, ..., H, W) with these facts.
        judge: of media with these facts.
        noun: what the shipped example is.
        unit: what a progress bar counts, and how many there are in a length along axis 2; None for no bar.
    """

    media: Media
    suffix: str
    writable: tuple[str, ...]
    open: Callable[[Path, Reading], AbstractContextManager[Source]]
    create: Callable[[Path, Facts, Sequence[int], Writing], AbstractContextManager[Sink]]
    judge: Callable[[Facts], Judge]
    noun: str
    unit: Literal["frame", "second"] | None = None

    def count(self, length: int, facts: Facts) -> int:
        """Units of a length along axis 2."""
        return length // facts.sampling_rate if self.unit == "second" and facts.sampling_rate else length


def medium_of(media: Media) -> Medium:
    """How to handle that kind of media."""
    medium: Medium = load_object(_MEDIA[media])
    return medium


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


_MEDIA: dict[Media, str] = {
    "image": "fastvideo_vae_core.cli.pictures:PICTURES",
    "video": "fastvideo_vae_core.cli.clips:CLIPS",
    "audio": "fastvideo_vae_core.cli.sounds:SOUNDS",
}
