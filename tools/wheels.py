"""Build the wheels of this workspace, say what is wrong with one, and install them into clean environments."""

from __future__ import annotations

import email
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from email.message import Message
from pathlib import Path

from workspace import CORE, ENTRY_POINT_GROUP, ROOT, Member

LARGEST_WEIGHTS_BYTES = 3_000_000
REFERENCES_ONLY = ("diffusers", "transformers")


def build(directory: Path) -> None:
    """Build the wheel of every installable member into `directory`."""
    uv("build", "--all-packages", "--wheel", "--quiet", "--out-dir", str(directory), cwd=ROOT)


def find_wheel(directory: Path, member: Member) -> Path:
    name = f"{member.import_name}-{member.version}-py3-none-any.whl"
    if not (directory / name).is_file():
        raise SystemExit(f"{directory} has no {name}; it has {', '.join(sorted(os.listdir(directory))) or 'nothing'}")
    return directory / name


def clean_environment(directory: Path, python: str) -> Path:
    """A virtual environment with nothing in it; returns its interpreter."""
    uv("venv", "--quiet", "--no-project", "--python", python, str(directory))
    return directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(python: Path, requirements: Sequence[str], *options: str) -> None:
    """Install from outside the workspace, so that none of its sources and settings can stand in for a release."""
    uv("pip", "install", "--quiet", "--python", str(python), *options, *requirements, cwd=python.parent)


def wheel_requirement(wheel: Path, member: Member, extras: Sequence[str] = ()) -> str:
    listed = f"[{','.join(extras)}]" if extras else ""
    return f"{member.name}{listed} @ {wheel.resolve().as_uri()}"


def locked_versions(file: Path) -> Path:
    """Write the versions of uv.lock as constraints for an installation outside the workspace."""
    which = ("--locked", "--all-packages", "--all-extras", "--all-groups", "--no-emit-workspace")
    form = ("--no-hashes", "--no-annotate", "--no-header", "--quiet", "--output-file", str(file))
    uv("export", *which, *form, cwd=ROOT)
    return file


def faults(wheel: Path, member: Member, core: Member) -> list[str]:
    """Why this wheel must not be published; an empty list means that it may."""
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist() if not entry.is_dir()}
        information = f"{member.import_name}-{member.version}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{information}/METADATA"))
        entry_points = f"{information}/entry_points.txt"
        declared = archive.read(entry_points).decode() if entry_points in sizes else ""
    found = [*content_faults(sizes, member, information), *metadata_faults(metadata, member, core)]
    found += [f"entry point {name} is missing" for name in member.families if f"{name} = " not in declared]
    if member.families and f"[{ENTRY_POINT_GROUP}]" not in declared:
        found.append(f"entry point group {ENTRY_POINT_GROUP} is missing")
    return [f"{wheel.name}: {fault}" for fault in found]


def content_faults(sizes: dict[str, int], member: Member, information: str) -> Iterator[str]:
    for name in sizes:
        if name.split("/")[0] not in (member.import_name, information):
            yield f"{name} is outside {member.import_name}/"
        if re.search(r"(^|/)(tests?|gpu)/|(^|/)(test_[^/]*|conftest)\.py$|\.pyc$", name):
            yield f"{name} does not belong into a wheel"
    for needed in (f"{member.import_name}/py.typed", f"{information}/licenses/LICENSE"):
        if needed not in sizes:
            yield f"{needed} is missing"
    for name, size in sizes.items():
        # Of each miniature; LTX-2 ships one of pictures and one of sound.
        if name.endswith(".safetensors") and size > LARGEST_WEIGHTS_BYTES:
            yield f"{name}: {size} bytes of weights, more than {LARGEST_WEIGHTS_BYTES}"


def metadata_faults(metadata: Message, member: Member, core: Member) -> Iterator[str]:
    wanted = {
        "Name": member.name,
        "Version": member.version,
        "License-Expression": "Apache-2.0",
        "Requires-Python": ">=3.11",
    }
    for field, value in wanted.items():
        if metadata[field] != value:
            yield f"{field} is {metadata[field]}, not {value}"
    requirements = metadata.get_all("Requires-Dist", [])
    for requirement in requirements:
        if "@" in requirement:
            yield f"{requirement} names an address"
        if re.match(rf"({'|'.join(REFERENCES_ONLY)})\b", requirement):
            yield f"{requirement} is a reference for tests, not something to run with"
    bound = "torch>=2.11" if member.name == CORE else core_bound(core)
    if bound not in requirements:
        yield f"requires {', '.join(requirements) or 'nothing'}, which lacks exactly {bound}"


def core_bound(core: Member) -> str:
    """What a family asks of core: this minor version and no later one, as core 0.4.2 -> ">=0.4,<0.5"."""
    major, minor = core.version.split(".")[:2]
    return f"{core.name}>={major}.{minor},<{major}.{int(minor) + 1}"


def uv(*arguments: str, cwd: Path | None = None) -> None:
    """Show and run uv; $UV names it when tools/dev.py or uv itself started this program."""
    command = [os.environ.get("UV") or shutil.which("uv") or "", *arguments]
    if not command[0]:
        raise SystemExit("uv is not on PATH; run this as `python3 tools/dev.py wheels`, which fetches it")
    print(f"$ uv {shlex.join(arguments)}", file=sys.stderr, flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    status = subprocess.run(command, cwd=cwd, env=environment).returncode
    if status:
        raise SystemExit(status)
