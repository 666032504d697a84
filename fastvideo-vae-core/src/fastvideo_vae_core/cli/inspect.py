"""`fastvideo-vae inspect`: what a checkpoint or a latent file holds, and what would be loaded from it."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastvideo_vae_core import registry
from fastvideo_vae_core.cli.console import Console, rows, sizes
from fastvideo_vae_core.errors import FamilyError, MediaError
from fastvideo_vae_core.latents import LatentReader
from fastvideo_vae_core.loading import inspect
from fastvideo_vae_core.memory import format_bytes


def run(options: argparse.Namespace) -> int:
    """Describe the source from its headers."""
    console = Console.of(options)
    latents = _as_latents(options.source)
    return _latents(latents, console) if latents is not None else _checkpoint(options, console)


def _as_latents(source: str) -> LatentReader | None:
    """The latent file, or None where the source is something else, whole or not."""
    if not Path(source).is_file():
        return None
    try:
        return LatentReader(source)
    except MediaError:
        return None


def _latents(file: LatentReader, console: Console) -> int:
    info, made_by = file.info, file.info.provenance
    dtype = str(file.dtype).removeprefix("torch.")
    rates = [("frame rate", info.frame_rate), ("sampling rate", info.sampling_rate)]
    console.say(
        "latent file",
        *rows(
            [
                ("latents", f"{sizes(file.shape)}, {dtype}, {info.space}"),
                ("samples", sizes(info.sample_shape)),
                *((name, str(rate)) for name, rate in rates if rate is not None),
                ("family", f"{made_by.family}, component {made_by.component}"),
                ("variant", made_by.variant or "none of the published ones"),
                ("checkpoint", made_by.checkpoint),
            ],
            indent=2,
        ),
    )
    console.finish(
        {
            "kind": "latents",
            "latent_shape": file.shape,
            "dtype": dtype,
            "space": info.space,
            "sample_shape": info.sample_shape,
            "frame_rate": info.frame_rate,
            "sampling_rate": info.sampling_rate,
            "pixel_aspect": info.pixel_aspect,
            "color": info.color,
            "provenance": asdict(made_by),
        }
    )
    return 0


def _checkpoint(options: argparse.Namespace, console: Console) -> int:
    about = inspect(options.source, subfolder=options.subfolder, revision=options.revision)
    problem = _problem(about)
    console.say(
        "checkpoint",
        *rows(
            [
                ("files", "\n".join(about["paths"])),
                (
                    "tensors",
                    f"{about['tensors']:,} with {about['parameters']:,} values, {format_bytes(about['bytes'])}",
                ),
                *([("class", about["class_name"])] if about["class_name"] else []),
                *([("problem", problem)] if problem else []),
            ],
            indent=2,
        ),
    )
    for component in about["components"]:
        console.say(
            "", f"{component['family']}, component {component['component']}", *rows(_facts(component), indent=2)
        )
    console.finish({"kind": "checkpoint", **about, "problem": problem})
    return 1 if problem else 0


def _problem(about: dict[str, Any]) -> str | None:
    """Why nothing would be loaded, if that is so."""
    if isinstance(about["class_name"], str):
        try:
            registry.resolve(about["class_name"])
        except FamilyError as error:
            return str(error)
    if about["components"]:
        return None
    installed = ", ".join(registry.installed()) or "none"
    return "\n".join([f"no network of an installed family ({installed}) is in it", *registry.failures().values()])


def _facts(component: dict[str, Any]) -> list[tuple[str, str]]:
    variants, arch, problem = component["variants"], component["arch"], component["problem"]
    prefix = f", prefix {component['prefix']!r}" if component["prefix"] else ""
    held = f"{component['tensors']:,} with {component['parameters']:,} values, {', '.join(component['dtypes'])}"
    facts = [
        ("layout", f"{component['layout']}{prefix}"),
        ("tensors", held),
        ("variant", " or ".join(variants) or "none of the published ones"),
    ]
    if len(variants) > 1:
        facts.append(("pass", " or ".join(f"--variant {name}" for name in variants)))
    if arch is not None:
        which = f" ({variants[0]})" if len(variants) > 1 else ""
        told = ", ".join(f"{name} {_plain(value)}" for name, value in arch.items() if value is not None)
        facts.append(("loads as", "\n".join(textwrap.wrap(f"{_class(component)}{which}: {told}", 100))))
    if problem is not None:
        facts.append(("problem", problem))
    return facts


def _class(component: dict[str, Any]) -> str:
    return registry.resolve(component["family"]).component(component["component"]).model.partition(":")[2]


def _plain(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)
