"""Normalisation of latents, and latent files that say where they come from."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastvideo_vae_core.errors import CheckpointError, MediaError, ShapeError
from fastvideo_vae_core.finite import is_finite
from fastvideo_vae_core.media.files import atomic_output

Space = Literal["raw", "normalized"]

_FORMAT = "fastvideo-vae-latents-1"
_SAFETENSORS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
# Bytes that are put in order at a time.
_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Which network made a latent.

    Attributes:
        family, component: as in the registry.
        variant: the published checkpoint whose architecture this is, if it is one.
        checkpoint: digest of the weights; the same for every file layout of one checkpoint.
    """

    family: str
    component: str = "vae"
    variant: str | None = None
    checkpoint: str


@dataclass(frozen=True, kw_only=True)
class LatentInfo:
    """What is needed to decode latents years later.

    Attributes:
        provenance: the network that made them.
        space: "raw" as `encode` gives them, or "normalized" as the diffusion model sees them.
        sample_shape: of the samples before any padding; decoding crops to it.
        frame_rate: frames per second as an exact fraction, "24000/1001", for video.
        sampling_rate: in Hz, for audio.
        pixel_aspect: width of a pixel over its height, "16/15", for video whose pixels are not square.
        color: matrix, range, primaries and transfer of the video file, as far as it said them.
    """

    provenance: Provenance
    space: Space
    sample_shape: tuple[int, ...]
    frame_rate: str | None = None
    sampling_rate: int | None = None
    pixel_aspect: str | None = None
    color: Mapping[str, str] | None = None

    def check(self, provenance: Provenance) -> None:
        """Refuse a network other than the one that made the latents.

        Raises:
            CheckpointError: another family, component or checkpoint; the message says which.
        """
        for item in ("family", "component", "checkpoint"):
            made, got = getattr(self.provenance, item), getattr(provenance, item)
            if made != got:
                raise CheckpointError(
                    f"these latents were made by {item} {made}, the model is {got}; load that one or use --force"
                )


@dataclass(frozen=True, kw_only=True)
class LatentFile(LatentInfo):
    """Latents (B, C, ...) and what is needed to decode them."""

    latents: Tensor


def write_latents(path: str | Path, file: LatentFile) -> None:
    """Write latents as safetensors with their provenance in the metadata; the file appears whole or not at all.

    Raises:
        MediaError: the path cannot be written, or the latents are not finite.
    """
    _require_finite(path, file.latents)
    with atomic_output(Path(path)) as temporary:
        save_file({"latents": file.latents.detach().cpu().contiguous()}, temporary, _metadata(file, file.latents.dtype))


def read_latents(path: str | Path) -> LatentFile:
    """Read what `write_latents` or a LatentWriter wrote.

    Raises:
        MediaError: the file is missing, damaged, or holds no latents of this format.
    """
    with _opened(path) as (handle, info):
        return LatentFile(latents=handle.get_tensor("latents"), **info)


class LatentReader:
    """Reads latents piece by piece; opening reads the header only.

    `LatentReader("clip.safetensors").read(0, 8)` gives the first eight latent frames, (1, C, 8, h, w). Between two
    calls nothing of the file is held.

    Raises:
        MediaError: the file is missing, damaged, or holds no latents of this format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        with _opened(path) as (handle, info):
            self.info = LatentInfo(**info)
            self.shape = tuple(int(size) for size in handle.get_slice("latents").get_shape())
        self.dtype = self.read(0, 1).dtype

    def read(self, start: int, stop: int) -> Tensor:
        """Latents [start, stop) along axis 2."""
        with _opened(self.path) as (handle, _):
            piece: Tensor = handle.get_slice("latents")[:, :, start:stop]
            return piece.clone()


class LatentWriter:
    """Writes latents piece by piece; the file appears when the `with` block ends well and `finish` was called in it.

    `with LatentWriter("clip.safetensors") as out: out.write(z_BCthw); ...; out.finish(info)`. Pieces follow each other
    along axis 2, whose length need not be known. The file is the one that `write_latents` gives. A tensor with its
    channels first cannot be appended to, so pieces wait in a nameless file beside the output, and memory for one is
    enough.

    Raises:
        MediaError: the path cannot be written, no latents came, or they are not finite.
        ShapeError: a piece does not continue the one before.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shape: tuple[int, ...] = ()
        self._dtype = torch.float32
        self._info: LatentInfo | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._temporary = stack.enter_context(atomic_output(self.path))
            self._spool: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(dir=self._temporary.parent))
            self._stack = stack.pop_all()
        return self

    def write(self, z: Tensor) -> None:
        """Append (B, C, t, ...) of any device."""
        _require_finite(self.path, z)
        if self.shape and (self._fixed(z.shape), z.dtype) != (self._fixed(self.shape), self._dtype):
            raise ShapeError(f"a piece {tuple(z.shape)} of {z.dtype} does not continue latents {self.shape}")
        length = (self.shape[2] if self.shape else 0) + z.shape[2]
        self.shape, self._dtype = (*z.shape[:2], length, *z.shape[3:]), z.dtype
        with self._disk_errors():
            self._spool.write(_bytes(z.detach().movedim(2, 0)))

    def finish(self, info: LatentInfo) -> None:
        """Say what the latents are; nothing more is written after that."""
        self._info = info

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if self._info is None or not self.shape:
                raise MediaError(f"{self.path} got no latents, so nothing is written")
            with self._disk_errors(), self._temporary.open("wb") as file:
                self._assemble(file, self._info)

    def _assemble(self, file: IO[bytes], info: LatentInfo) -> None:
        """The header of safetensors, and the spooled pieces behind it with their channels first."""
        length, rows = self.shape[2], self.shape[0] * self.shape[1]
        row = math.prod(self.shape[3:]) * self._dtype.itemsize
        file.write(_header(self.shape, self._dtype, _metadata(info, self._dtype)))
        begin = file.tell()
        step = max(_BLOCK // (rows * row), 1)
        self._spool.seek(0)
        for start in range(0, length, step):
            count = min(step, length - start)
            block = torch.empty(count, rows, row, dtype=torch.uint8)
            self._spool.readinto(block.numpy().data)  # type: ignore[attr-defined]
            for index, part in enumerate(block.unbind(1)):
                file.seek(begin + (index * length + start) * row)
                file.write(_bytes(part))

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MediaError(f"cannot write {self.path}: {error.strerror}; choose another folder") from error

    @staticmethod
    def _fixed(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:2], *shape[3:])


def _require_finite(path: str | Path, z: Tensor) -> None:
    if not is_finite(z):
        raise MediaError(f"the latents for {path} hold NaN or infinity; nothing was written")


def _bytes(x: Tensor) -> memoryview:
    return x.contiguous().cpu().flatten().view(torch.uint8).numpy().data


def _metadata(info: LatentInfo, dtype: torch.dtype) -> dict[str, str]:
    about: dict[str, Any] = {
        **{f"provenance.{name}": value for name, value in asdict(info.provenance).items()},
        "space": info.space,
        "sample_shape": list(info.sample_shape),
        "frame_rate": info.frame_rate,
        "sampling_rate": info.sampling_rate,
        "pixel_aspect": info.pixel_aspect,
        "color": None if info.color is None else dict(info.color),
        "dtype": str(dtype).removeprefix("torch."),
    }
    return {"format": _FORMAT, **{name: json.dumps(value) for name, value in about.items() if value is not None}}


def _header(shape: tuple[int, ...], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    size = math.prod(shape) * dtype.itemsize
    latents = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": metadata, "latents": latents}).encode()
    # Tensors begin on a multiple of eight bytes.
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open file, and what it says of its latents."""
    try:
        with safe_open(str(path), framework="pt") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise MediaError(f"{path} is no latent file of this tool; `fastvideo-vae inspect` tells what it is")
            yield handle, _described(metadata)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise MediaError(f"{path} cannot be read as latents ({error})") from None


def _described(metadata: Mapping[str, str]) -> dict[str, Any]:
    about = {name: json.loads(text) for name, text in metadata.items() if name != "format"}
    if about["space"] not in get_args(Space):
        raise ValueError(f"space {about['space']!r}")
    color = about.get("color")
    return {
        "provenance": Provenance(
            family=about["provenance.family"],
            component=about["provenance.component"],
            variant=about.get("provenance.variant"),
            checkpoint=about["provenance.checkpoint"],
        ),
        "space": about["space"],
        "sample_shape": tuple(int(size) for size in about["sample_shape"]),
        "frame_rate": about.get("frame_rate"),
        "sampling_rate": about.get("sampling_rate"),
        "pixel_aspect": about.get("pixel_aspect"),
        "color": None if color is None else {str(name): str(value) for name, value in dict(color).items()},
    }


def scale_latents(
    z: Tensor,
    scaling_factor: float,
    shift_factor: float | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Normalise latents as the KL pipelines do: (z - mean) * scaling / std, else (z - shift) * scaling.

    mean, std: per channel, (C,). The operations and their order are those of diffusers' pipelines.
    """
    if mean is not None and std is not None:
        mean, std = _per_channel(mean, z), _per_channel(std, z)
        return (z - mean) * scaling_factor / std
    return (z - shift_factor if shift_factor is not None else z) * scaling_factor


def unscale_latents(
    z: Tensor,
    scaling_factor: float,
    shift_factor: float | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """The inverse of `scale_latents`: z * std / scaling + mean, else z / scaling + shift."""
    if mean is not None and std is not None:
        mean, std = _per_channel(mean, z), _per_channel(std, z)
        return z * std / scaling_factor + mean
    z = z / scaling_factor
    return z + shift_factor if shift_factor is not None else z


def _per_channel(values: Tensor, z: Tensor) -> Tensor:
    return values.to(z).view(1, -1, *[1] * (z.ndim - 2))
