"""Normalisation of latents, and latent files that say where they come from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastvideo_vae_core.errors import CheckpointError, MediaError
from fastvideo_vae_core.media.files import atomic_output

Space = Literal["raw", "normalized"]

_FORMAT = "fastvideo-vae-latents-1"


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
class LatentFile:
    """Latents and what is needed to decode them years later.

    Attributes:
        latents: (B, C, ...).
        provenance: the network that made them.
        space: "raw" as `encode` gives them, or "normalized" as the diffusion model sees them.
        sample_shape: of the samples before any padding; decoding crops to it.
        frame_rate: frames per second as an exact fraction, "24000/1001", for video.
        sampling_rate: in Hz, for audio.
    """

    latents: Tensor
    provenance: Provenance
    space: Space
    sample_shape: tuple[int, ...]
    frame_rate: str | None = None
    sampling_rate: int | None = None

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


def write_latents(path: str | Path, file: LatentFile) -> None:
    """Write latents as safetensors with their provenance in the metadata; the file appears whole or not at all.

    Raises:
        MediaError: the path cannot be written, or the latents are not finite.
    """
    if not bool(file.latents.isfinite().all()):
        raise MediaError(f"the latents for {path} hold NaN or infinity; nothing was written")
    about: dict[str, Any] = {
        **{f"provenance.{name}": value for name, value in asdict(file.provenance).items()},
        "space": file.space,
        "sample_shape": list(file.sample_shape),
        "frame_rate": file.frame_rate,
        "sampling_rate": file.sampling_rate,
        "dtype": str(file.latents.dtype).removeprefix("torch."),
    }
    metadata = {"format": _FORMAT, **{name: json.dumps(value) for name, value in about.items() if value is not None}}
    with atomic_output(Path(path)) as temporary:
        save_file({"latents": file.latents.detach().cpu().contiguous()}, temporary, metadata)


def read_latents(path: str | Path) -> LatentFile:
    """Read what `write_latents` wrote.

    Raises:
        MediaError: the file is missing, damaged, or holds no latents of this format.
    """
    try:
        with safe_open(str(path), framework="pt") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise MediaError(f"{path} is no latent file of this tool; `fastvideo-vae inspect` tells what it is")
            latents = handle.get_tensor("latents")
        about = {name: json.loads(text) for name, text in metadata.items() if name != "format"}
        provenance = Provenance(
            family=about["provenance.family"],
            component=about["provenance.component"],
            variant=about.get("provenance.variant"),
            checkpoint=about["provenance.checkpoint"],
        )
        if about["space"] not in get_args(Space):
            raise ValueError(f"space {about['space']!r}")
        return LatentFile(
            latents=latents,
            provenance=provenance,
            space=about["space"],
            sample_shape=tuple(int(size) for size in about["sample_shape"]),
            frame_rate=about.get("frame_rate"),
            sampling_rate=about.get("sampling_rate"),
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise MediaError(f"{path} cannot be read as latents ({error})") from None


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
