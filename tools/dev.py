"""Everything that the README, a contributor and CI run, by one name each: `python3 tools/dev.py --help`.

It needs Python 3.11 and nothing else. uv is taken from PATH or from this Python; where there is none, or too old a one,
it is installed into a private environment in .uv/, so that a Python that its distribution manages stays untouched.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    sys.exit(f"fastvideo-vae needs Python 3.11 or newer, and this is {sys.version.split()[0]}")

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from workspace import ROOT, installable_members

LARGEST_FILE_BYTES = 3_200_000


def main(arguments: Sequence[str]) -> None:
    os.chdir(ROOT)
    if not arguments or arguments[0] not in COMMANDS:
        wanted = arguments and arguments[0] not in ("-h", "--help")
        sys.exit(usage() if wanted else print(usage()))
    COMMANDS[arguments[0]](arguments[1:])


def usage() -> str:
    lines = [f"  {name:<9} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: python3 tools/dev.py COMMAND [ARGUMENTS]", "", *lines])


def demo(arguments: Sequence[str]) -> None:
    """set up, then see a photograph go through a trained autoencoder and come back, in demo-output/"""
    sync([])
    run(uv(), "run", "--no-sync", "fastvideo-vae", "demo", "--output", "demo-output", *arguments)


def test(arguments: Sequence[str]) -> None:
    """set up, then run the tests, a process for each core up to four; arguments go to pytest"""
    sync([])
    # A file at a time, since its tests share what is slow to make. One thread for each process, or they would wait for
    # each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    processes = str(min(os.cpu_count() or 1, 4))
    run(uv(), "run", "--no-sync", "pytest", "--numprocesses", processes, "--dist", "loadfile", *arguments)


def sync(arguments: Sequence[str]) -> None:
    """install every package, every extra and the development tools at the locked versions into .venv/"""
    fresh = not Path(".venv").exists()
    run(uv(), "sync", "--all-packages", "--all-extras", "--locked", *(supported_python() if fresh else ()), *arguments)


def lint(arguments: Sequence[str]) -> None:
    """ruff's rules and format, and the plain hygiene of every file"""
    run(uv(), "run", "--no-sync", "ruff", "check", *arguments)
    run(uv(), "run", "--no-sync", "ruff", "format", "--check", *arguments)
    faults = [fault for name in repository_files() for fault in hygiene(name, (ROOT / name).read_bytes())]
    if faults:
        sys.exit("\n".join(faults))


def types(arguments: Sequence[str]) -> None:
    """mypy, strict, on the source of every package and on the tools"""
    sources = [f"{member.path}/src" for member in installable_members()]
    run(uv(), "run", "--no-sync", "mypy", *sources, "tools", *arguments)


def isolated(arguments: Sequence[str]) -> None:
    """test one package's wheel in an environment of its own: see tools/isolated_test.py --help"""
    run(sys.executable, "tools/isolated_test.py", *arguments)


def wheels(arguments: Sequence[str]) -> None:
    """build the wheels, install each family alone and run it there: see tools/wheel_test.py --help"""
    run(sys.executable, "tools/wheel_test.py", *arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    command.__name__: command for command in (demo, test, sync, lint, types, isolated, wheels)
}


def hygiene(name: str, content: bytes) -> list[str]:
    """What is wrong with one file, whatever its language: size, line ends, stray blanks, left-over conflict marks.

    >>> hygiene("a.py", b"x = 1 ")
    ['a.py:1: blanks at the end of the line', 'a.py: the last line does not end']
    """
    if len(content) > LARGEST_FILE_BYTES:
        return [f"{name}: {len(content)} bytes, more than {LARGEST_FILE_BYTES}"]
    if b"\0" in content or not content:
        return []
    faults = [f"{name}: lines end with a carriage return"] if b"\r\n" in content else []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.endswith((b" ", b"\t")):
            faults.append(f"{name}:{number}: blanks at the end of the line")
        if line.startswith((b"<<<<<<< ", b">>>>>>> ")):
            faults.append(f"{name}:{number}: a conflict mark")
    if not content.endswith(b"\n"):
        faults.append(f"{name}: the last line does not end")
    return faults


def repository_files() -> list[str]:
    """What git tracks or would track, less what is deleted in the working tree; named from the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted({name for name in listed.split("\0") if name and (ROOT / name).is_file()})


def run(*command: str) -> None:
    """Show a command, run it, and stop with its exit status when it fails."""
    print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    status = subprocess.run(command, env=environment).returncode
    if status:
        sys.exit(status)


def uv() -> str:
    """A uv that is new enough, installed into .uv/ if need be; the tools that this one starts find it in $UV."""
    if "UV" not in os.environ:
        private = ".uv/Scripts/uv.exe" if os.name == "nt" else ".uv/bin/uv"
        here = Path(sys.executable).with_name(Path(private).name)
        candidates = [shutil.which("uv"), str(here), str(ROOT / private)]
        usable = next((path for path in candidates if path and is_new_enough(path)), None)
        os.environ["UV"] = usable or install_uv(ROOT / private)
    return os.environ["UV"]


def is_new_enough(path: str) -> bool:
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return False
    return version_of(said) >= version_of(required_uv())


def required_uv() -> str:
    found = re.search(
        r'^required-version = ">=([\d.]+)"$', Path("pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    return found.group(1) if found else "0"


def version_of(text: str) -> tuple[int, ...]:
    """
    >>> version_of("uv 0.13.9 (x86_64-unknown-linux-gnu)")
    (0, 13, 9)
    """
    found = re.search(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def install_uv(path: Path) -> str:
    environment = path.parent.parent
    print(f"no uv {required_uv()} or newer here: installing one into {environment.name}/", file=sys.stderr)
    if has_module("ensurepip"):
        run(sys.executable, "-m", "venv", "--clear", str(environment))
        run(str(path.with_name("python")), "-m", "pip", "install", "--quiet", f"uv>={required_uv()}")
    elif has_module("pip"):
        run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(environment))
        pip = (sys.executable, "-m", "pip", "--python", str(path.with_name("python")))
        run(*pip, "install", "--quiet", f"uv>={required_uv()}")
    else:
        sys.exit("this Python has neither ensurepip nor pip; on Debian or Ubuntu run `sudo apt install python3-venv`")
    return str(path)


def has_module(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0


def supported_python() -> tuple[str, str]:
    """This interpreter when the lock covers it; else uv finds or fetches one that is covered."""
    return ("--python", sys.executable if sys.version_info < (3, 14) else "3.13")


if __name__ == "__main__":
    main(sys.argv[1:])
