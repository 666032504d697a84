"""Test what people install: build every wheel, look inside it, install each family alone and run it there.

`python3 tools/dev.py wheels` tests them all; name packages to test only those, and `--dist` to test wheels that exist.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import wheels
from workspace import CORE, Member, installable_members, select

# core's testing module is for those who have pytest.
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if ".testing" not in module.name:
            importlib.import_module(module.name)
"""
REFERENCES_ABSENT = "import importlib.util, sys; sys.exit(any(map(importlib.util.find_spec, sys.argv[1:])))"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fastvideo-vae-wheels-") as scratch:
        workspace = Path(scratch)
        dist = options.dist
        if dist is None:
            dist = workspace / "dist"
            wheels.build(dist)
        constraints = wheels.locked_versions(workspace / "locked.txt")
        for member in select(options.packages):
            check_contents(dist, member)
            check_installed(dist, member, workspace / member.name, constraints, options)
            print(f"{member.name} {member.version}: the wheel is sound, installs alone and runs", flush=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="only these packages; default: every one")
    parser.add_argument("--dist", type=Path, help="directory of wheels to test; default: build them")
    parser.add_argument("--python", default=sys.executable, help="interpreter or version; default: this one")
    parser.add_argument("--published-core", action="store_true", help="install core from the index, not from --dist")
    return parser


def check_contents(dist: Path, member: Member) -> None:
    found = wheels.faults(wheels.find_wheel(dist, member), member, core())
    if found:
        sys.exit("\n".join(found))


def check_installed(dist: Path, member: Member, scratch: Path, constraints: Path, options: argparse.Namespace) -> None:
    scratch.mkdir()
    python = wheels.clean_environment(scratch / "env", options.python)
    # What the demonstration of a family needs: files, and sound where it has any.
    extras = sorted({"audio", "media"} & set(member.extras)) if member.is_family else []
    requirements = [wheels.wheel_requirement(wheels.find_wheel(dist, member), member, extras)]
    if member.is_family and not options.published_core:
        requirements.append(wheels.wheel_requirement(wheels.find_wheel(dist, core()), core()))
    wheels.install(python, requirements, "--constraint", str(constraints))
    wheels.uv("pip", "check", "--quiet", "--python", str(python))
    ask(scratch, python, "-c", REFERENCES_ABSENT, *wheels.REFERENCES_ONLY)
    check_runs(python, member, scratch)


def check_runs(python: Path, member: Member, scratch: Path) -> None:
    """Run it as its user would, from a directory that is not the repository."""
    command = python.with_name("fastvideo-vae")
    listed = json.loads(ask(scratch, command, "families", "--json"))
    if {entry["name"]: entry["status"] for entry in listed} != dict.fromkeys(member.families, "installed"):
        sys.exit(f"{member.name}: `fastvideo-vae families --json` lists {listed}, not {list(member.families)}")
    if not member.is_family:
        return
    ask(scratch, python, "-c", IMPORT_EVERYTHING, core().import_name, member.import_name)
    if not any(entry["demo"] for entry in listed):
        print(f"{member.name} ships no demonstration weights yet: nothing to run", flush=True)
        return
    ask(scratch, command, "demo", "--output", "demo")
    written = [path for path in (scratch / "demo").rglob("*") if path.is_file()]
    if not written or any(path.stat().st_size == 0 for path in written):
        sys.exit(f"{member.name}: the demo wrote {[path.name for path in written]}, or an empty file among them")


def ask(cwd: Path, *command: str | Path) -> str:
    """Run a program of the clean environment and give back what it prints; stop with its output when it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(words)} ended with status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def core() -> Member:
    return next(member for member in installable_members() if member.name == CORE)


if __name__ == "__main__":
    main()
