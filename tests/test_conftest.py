"""The rules that conftest.py lays on every run, tried on small test suites of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from workspace import ROOT

SUITE = """
import pytest

@pytest.mark.conformance
class TestContract:
    def test_one(self): pass
    def test_two(self): pass
    def test_three(self): pytest.skip("this machine has no microscope")

def test_other(): pass

@pytest.mark.xfail
def test_expected(): raise ValueError
"""
SETTINGS = "[pytest]\naddopts = --import-mode=importlib\nmarkers =\n    conformance\n    gpu\n"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text(SETTINGS)
    return tmp_path


def test_each_package_shows_how_many_conformance_tests_it_ran(workspace: Path) -> None:
    write(workspace / "packages/fastvideo-vae-one/tests/test_conformance.py", SUITE)
    write(workspace / "fastvideo-vae-core/tests/test_core.py", "def test_core(): pass")
    write(workspace / "tests/test_root.py", "def test_root(): pass")
    status, output = run(workspace)
    assert status == 0
    assert [line for line in output.splitlines() if line.startswith("conformance: ")] == [
        "conformance: fastvideo-vae-core ran 0 tests",
        "conformance: fastvideo-vae-one ran 2 tests",
    ]


@pytest.mark.parametrize("value", ["", "0"])
def test_a_skip_is_allowed_by_default(workspace: Path, value: str) -> None:
    write(workspace / "tests/test_suite.py", SUITE)
    status, output = run(workspace, PARITY_STRICT=value)
    assert status == 0
    assert "3 passed, 1 skipped, 1 xfailed" in output


def test_a_skip_is_a_failure_under_parity_strict(workspace: Path) -> None:
    write(workspace / "tests/test_suite.py", SUITE)
    status, output = run(workspace, PARITY_STRICT="1")
    assert status == 1
    assert "1 failed, 3 passed, 1 xfailed" in output
    assert "PARITY_STRICT=1 allows no skip: Skipped: this machine has no microscope" in output


@pytest.mark.parametrize(
    "source", ["pytest.importorskip('no_such_module')", "pytest.skip('x', allow_module_level=True)"]
)
def test_a_skipped_module_is_a_failure_under_parity_strict(workspace: Path, source: str) -> None:
    write(workspace / "tests/test_suite.py", f"import pytest\n{source}\ndef test_one(): pass\n")
    status, output = run(workspace, PARITY_STRICT="1")
    assert status != 0
    assert "PARITY_STRICT=1 allows no skip" in output


def test_a_gpu_test_says_what_the_machine_lacks(workspace: Path) -> None:
    write(workspace / "torch.py", "class cuda:\n    is_available = staticmethod(lambda: False)\n")
    write(workspace / "tests/test_suite.py", "import pytest\n@pytest.mark.gpu\ndef test_one(): raise ValueError\n")
    status, output = run(workspace, PYTHONPATH=str(workspace))
    assert status == 0
    assert "this machine has no CUDA device" in output


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def run(workspace: Path, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=workspace, env={"PATH": "", **environment}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr
