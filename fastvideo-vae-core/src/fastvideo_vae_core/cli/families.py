"""`fastvideo-vae families`: what is installed, what is broken, what could be installed."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastvideo_vae_core import registry
from fastvideo_vae_core.cli.console import Console, rows
from fastvideo_vae_core.family import Family


def run(options: argparse.Namespace) -> int:
    """Describe every family without importing torch."""
    console = Console.of(options)
    installed = registry.installed()
    broken = registry.failures()
    for family in installed.values():
        console.say(family.name, *rows(_facts(family), indent=2), "")
    if not installed:
        console.say("No family is installed.", "")
    if broken:
        console.say("broken:", *rows(broken.items(), indent=2), "")
    if missing := registry.missing():
        console.say(
            "not installed:", *rows(((name, f"pip install {package}") for name, package in missing.items()), indent=2)
        )
    console.finish([*map(_entry, installed.values()), *(_broken_entry(*each) for each in broken.items())])
    return 0


def distribution_version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _facts(family: Family) -> list[tuple[str, str]]:
    several = len(family.components) > 1
    variants = [
        f"{f'{component.name}: ' if several else ''}{', '.join(component.variants)}" for component in family.components
    ]
    return [
        ("title", family.title),
        ("package", f"{family.distribution} {distribution_version(family.distribution) or '(not a distribution)'}"),
        ("variants", "\n".join(variants)),
        ("components", ", ".join(f"{component.name} ({component.media})" for component in family.components)),
        ("demo", "yes" if family.demo else "no"),
    ]


def _entry(family: Family) -> dict[str, Any]:
    components = [
        {
            "name": component.name,
            "media": component.media,
            "class_names": list(component.class_names),
            "variants": list(component.variants),
        }
        for component in family.components
    ]
    return {
        "name": family.name,
        "status": "installed",
        "distribution": family.distribution,
        "version": distribution_version(family.distribution),
        "title": family.title,
        "components": components,
        "demo": family.demo is not None,
    }


def _broken_entry(name: str, reason: str) -> dict[str, Any]:
    return {"name": name, "status": "broken", "error": reason}
