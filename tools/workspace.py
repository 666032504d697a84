"""The members of this workspace, as their own pyproject.toml files describe them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CORE = "fastvideo-vae-core"
ENTRY_POINT_GROUP = "fastvideo_vae_core.families"

PACKAGE_FILES = (
    *("CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"),
    *("src/{package}/__init__.py", "src/{package}/py.typed"),
)
FAMILY_FILES = (
    *PACKAGE_FILES,
    *(f"src/{{package}}/{module}.py" for module in ("checkpoint", "config", "family", "model")),
    *(f"tests/test_{subject}.py" for subject in ("checkpoint", "conformance", "parity")),
    "tests/gpu/test_parity_gpu.py",
)


@dataclass(frozen=True, kw_only=True)
class Member:
    """One directory of the workspace; `path` is relative to the root, with forward slashes."""

    name: str
    path: str
    version: str
    installable: bool
    dependencies: tuple[str, ...]
    extras: dict[str, tuple[str, ...]]
    families: dict[str, str]

    @property
    def import_name(self) -> str:
        return self.name.replace("-", "_")

    @property
    def is_family(self) -> bool:
        return self.installable and self.name != CORE


def members(root: Path = ROOT) -> list[Member]:
    """Every member, core first; one without a build system is a skeleton that nothing may build or list."""
    patterns = _read(root)["tool"]["uv"]["workspace"]["members"]
    found = {path.parent for pattern in patterns for path in root.glob(f"{pattern}/pyproject.toml")}
    parsed = [_member(path, root) for path in found]
    return sorted(parsed, key=lambda member: (member.name != CORE, member.name))


def installable_members(root: Path = ROOT) -> list[Member]:
    return [member for member in members(root) if member.installable]


def select(names: Iterable[str], root: Path = ROOT) -> list[Member]:
    """The installable members of these names, or all of them when none is given."""
    known = {member.name: member for member in installable_members(root)}
    chosen = list(names) or list(known)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SystemExit(f"no such package: {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in chosen]


def _member(directory: Path, root: Path) -> Member:
    document = _read(directory)
    project = document["project"]
    return Member(
        name=project["name"],
        path=directory.relative_to(root).as_posix(),
        version=project["version"],
        installable="build-system" in document,
        dependencies=tuple(project.get("dependencies", ())),
        extras={name: tuple(needed) for name, needed in project.get("optional-dependencies", {}).items()},
        families=project.get("entry-points", {}).get(ENTRY_POINT_GROUP, {}),
    )


def _read(directory: Path) -> dict[str, Any]:
    with open(directory / "pyproject.toml", "rb") as file:
        return tomllib.load(file)
