"""Run one package's tests against its wheel, in an environment that has no other package of this workspace but core.

`--resolution locked` installs the versions of uv.lock, `lowest-direct` the oldest that the packages say they work with.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import wheels
from workspace import CORE, ROOT, Member, select


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    [member] = select([options.package])
    tested = select([CORE]) if member.name == CORE else [*select([CORE]), member]
    with tempfile.TemporaryDirectory(prefix="fastvideo-vae-isolated-") as scratch:
        directory = Path(scratch)
        wheels.build(directory / "dist")
        python = wheels.clean_environment(directory / "env", options.python)
        requirements = [
            wheels.wheel_requirement(wheels.find_wheel(directory / "dist", each), each, sorted(each.extras))
            for each in tested
        ]
        wheels.install(python, requirements, *resolution(options.resolution, tested, directory))
        command = [str(python), "-m", "pytest", f"{member.path}/tests", *shlex.split(options.pytest)]
        status = subprocess.run(command, cwd=ROOT).returncode
    sys.exit(status)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("package", metavar="PACKAGE")
    parser.add_argument("--python", default=sys.executable, help="interpreter or version; default: this one")
    parser.add_argument("--resolution", choices=("locked", "lowest-direct"), default="locked")
    parser.add_argument("--pytest", default="", metavar="ARGUMENTS", help="for pytest, as `--pytest='-x -k tiling'`")
    return parser


def resolution(which: str, tested: Sequence[Member], directory: Path) -> list[str]:
    """The options that make uv choose these versions, the test tools included."""
    tools = ["--group", f"{ROOT / 'pyproject.toml'}:dev"]
    if which == "locked":
        return [*tools, "--constraint", str(wheels.locked_versions(directory / "locked.txt"))]
    # uv calls direct what it is asked for, and of a wheel it is asked for the wheel alone.
    direct = directory / "direct.txt"
    direct.write_text("".join(f"{requirement}\n" for requirement in third_party(tested)), encoding="utf-8")
    # An old release without a wheel for this Python would be compiled; the oldest with one is the oldest people get.
    return [*tools, "--resolution", "lowest-direct", "--no-build", "--requirement", str(direct)]


def third_party(tested: Sequence[Member]) -> Iterator[str]:
    for member in tested:
        for requirements in (member.dependencies, *member.extras.values()):
            yield from (needed for needed in requirements if not needed.startswith("fastvideo-vae-"))


if __name__ == "__main__":
    main()
