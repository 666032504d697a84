"""`fastvideo-vae doctor`: what this machine has, and what is wrong with it."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastvideo_vae_core import registry
from fastvideo_vae_core.cli.console import Console
from fastvideo_vae_core.cli.families import distribution_version

Status = Literal["ok", "note", "wrong"]

_TORCH_MINIMUM = (2, 11)
# Beginning of the version -> what is wrong with it.
_BAD_TORCH = {
    "2.9.": "sends bfloat16 conv3d past cuDNN: 3 to 17 times the memory, 4 times the time",
}
# Extra -> what it is for, and the modules that it brings.
_EXTRAS = {
    "media": ("pictures, video and sound", ("PIL", "av", "soundfile")),
    "report": ("comparison pictures", ("matplotlib",)),
    "hub": ("checkpoints from the hub", ("huggingface_hub",)),
    "audio": ("resampling and mel spectrograms", ("torchaudio",)),
}
_DISTRIBUTION_OF = {"PIL": "pillow"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: "note" is worth knowing, "wrong" must be mended."""

    status: Status
    subject: str
    text: str


def run(options: argparse.Namespace) -> int:
    """Report every finding; the exit code is 1 if one of them is wrong."""
    console = Console.of(options)
    findings = [*_python(), *_torch(), *_families(), *_extras()]
    width = max(len(finding.subject) for finding in findings)
    console.say(*(f"{_MARKS[each.status]}  {each.subject:<{width}}  {each.text}" for each in findings))
    wrong = sum(finding.status == "wrong" for finding in findings)
    console.say("", f"{wrong} to mend." if wrong else "All is well.")
    console.finish({"healthy": not wrong, "findings": [asdict(finding) for finding in findings]})
    return 1 if wrong else 0


_MARKS: dict[Status, str] = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}


def _python() -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform()} ({sys.executable})")
    yield Finding("ok", "fastvideo-vae-core", str(distribution_version("fastvideo-vae-core")))


def _torch() -> Iterator[Finding]:
    try:
        import torch
    # A broken installation fails in many ways: missing libraries, a wrong architecture, a half-finished upgrade.
    except Exception as error:
        yield Finding("wrong", "torch", f"cannot be imported ({_first_line(error)}); install it again")
        return
    version = str(torch.__version__)
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield from _torch_version(version, built)
    if not torch.cuda.is_available():
        yield Finding("note", "cuda", "no device that torch can use; everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
    yield _cudnn(torch)


def _torch_version(version: str, built: str) -> Iterator[Finding]:
    bad = next((reason for start, reason in _BAD_TORCH.items() if version.startswith(start)), None)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if bad is not None:
        yield Finding("wrong", "torch", f"{version} {bad}; install torch {_wanted()} or newer")
    elif numbers < _TORCH_MINIMUM:
        yield Finding("wrong", "torch", f"{version} is too old; install torch {_wanted()} or newer")
    else:
        yield Finding("ok", "torch", f"{version}, {built}")


def _cudnn(torch: Any) -> Finding:
    version = torch.backends.cudnn.version()
    if version is None:
        return Finding("wrong", "cudnn", "torch finds none, and convolutions crawl; install torch again")
    return Finding("ok", "cudnn", f"{version // 10000}.{version // 100 % 100}.{version % 100}")


def _families() -> Iterator[Finding]:
    installed, broken = registry.installed(), registry.failures()
    for name, family in installed.items():
        yield Finding("ok", name, f"{family.distribution} {distribution_version(family.distribution)}, {family.title}")
    for name, reason in broken.items():
        yield Finding("wrong", name, reason)
    for name, distribution in registry.missing().items():
        yield Finding("note", name, f"not installed: pip install {distribution}")
    if not installed and not broken:
        yield Finding("wrong", "families", "none is installed, so nothing can be loaded")


def _extras() -> Iterator[Finding]:
    for extra, (purpose, modules) in _EXTRAS.items():
        failed = {module: error for module in modules if (error := _import_error(module)) is not None}
        command = f'pip install "fastvideo-vae-core[{extra}]"'
        absent = [_DISTRIBUTION_OF.get(name, name) for name, error in failed.items() if _is_absent(name, error)]
        broken = {name: error for name, error in failed.items() if not _is_absent(name, error)}
        for name, error in broken.items():
            yield Finding("wrong", f"extra {extra}", f"{name} is installed and fails to import: {_first_line(error)}")
        if absent:
            yield Finding("note", f"extra {extra}", f"{purpose}: {', '.join(absent)} missing; {command}")
        elif not broken:
            yield Finding("ok", f"extra {extra}", purpose)


def _import_error(module: str) -> Exception | None:
    try:
        importlib.import_module(module)
    # Native libraries that do not fit raise OSError or RuntimeError as well as ImportError.
    except Exception as error:
        return error
    return None


def _is_absent(module: str, error: Exception) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name == module


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _wanted() -> str:
    return ".".join(map(str, _TORCH_MINIMUM))
