"""Importing is budgeted: what lists and describes must be quick, and must bring nothing but Python and ourselves."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workspace import Member, installable_members

HELP_BUDGET_SECONDS = 0.3
COMMAND = Path(sys.executable).with_name("fastvideo-vae")
FAMILIES = [member for member in installable_members() if member.is_family]
RUN_COMMAND = """
import sys
from importlib.metadata import entry_points
[command] = entry_points(group="console_scripts", name="fastvideo-vae")
sys.argv = ["fastvideo-vae", *{arguments!r}]
try:
    code = command.load()()
except SystemExit as end:
    code = end.code
assert not code, code
"""


def test_importing_core_and_listing_families_imports_neither_torch_nor_a_family() -> None:
    assert loaded_by("import fastvideo_vae_core; assert fastvideo_vae_core.families()") == {"fastvideo_vae_core"}


@pytest.mark.parametrize("member", FAMILIES, ids=lambda member: member.name)
def test_importing_a_family_and_its_description_does_not_import_torch(member: Member) -> None:
    described = "".join(f"import {value.partition(':')[0]}; " for value in member.families.values())
    assert loaded_by(f"import {member.import_name}; {described}") == {"fastvideo_vae_core", member.import_name}


@pytest.mark.parametrize("arguments", [["--help"], ["families"], ["families", "--json"]], ids=" ".join)
def test_help_and_listing_do_not_import_torch(arguments: list[str]) -> None:
    ours = {"fastvideo_vae_core", *(member.import_name for member in FAMILIES)}
    assert loaded_by(RUN_COMMAND.format(arguments=arguments)) <= ours


def test_help_is_quick() -> None:
    """Wall time, as its user has it. A machine that is busy with something else gets several rounds to be quick in."""
    rounds: list[float] = []
    while len(rounds) < 5 and min(rounds, default=HELP_BUDGET_SECONDS) >= HELP_BUDGET_SECONDS:
        rounds.append(statistics.median(time_of([str(COMMAND), "--help"]) for _ in range(5)))
    interpreter = statistics.median(time_of([sys.executable, "-c", "pass"]) for _ in range(5))
    assert min(rounds) < HELP_BUDGET_SECONDS, f"medians {rounds}; Python alone takes {interpreter:.3f} s"


def loaded_by(code: str) -> set[str]:
    """Top-level modules that running `code` adds to a new interpreter, without those of Python itself."""
    return loaded_modules(code) - loaded_modules("") - sys.stdlib_module_names


def loaded_modules(code: str) -> set[str]:
    report = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def time_of(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start
