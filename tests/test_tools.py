"""The tools decide what is checked, built and published, so their decisions are tested like code that ships."""

from __future__ import annotations

import doctest
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import affected
import dev
import isolated_test
import release_check
import scaffold_family
import wheels
import workspace
from workspace import ROOT, Member

# The training scripts are left out: importing torch takes longer than all of these tests.
TOOLS = sorted(
    path.stem
    for path in (ROOT / "tools").glob("*.py")
    if not any(
        each in path.read_text(encoding="utf-8") for each in ("import numpy", "from demo_training", "import demo_video")
    )
)


def member(name: str, path: str, *, installable: bool = True, dependencies: tuple[str, ...] = ()) -> Member:
    family = name.removeprefix("fastvideo-vae-").replace("-", "_")
    return Member(
        name=name,
        path=path,
        version="0.1.0",
        installable=installable,
        dependencies=dependencies,
        extras={},
        families={family: f"fastvideo_vae_{family}.family:FAMILY"} if installable and family != "core" else {},
    )


CORE = member("fastvideo-vae-core", "fastvideo-vae-core")
ONE = member("fastvideo-vae-one", "packages/fastvideo-vae-one", dependencies=("fastvideo-vae-core>=0.1,<0.2",))
TWO = member("fastvideo-vae-two", "packages/fastvideo-vae-two", dependencies=("fastvideo-vae-core>=0.1,<0.2",))
SKELETON = member("fastvideo-vae-three", "packages/fastvideo-vae-three", installable=False)
MEMBERS = [CORE, ONE, TWO, SKELETON]
ALL = [CORE.name, ONE.name, TWO.name]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ([], []),
        (["README.md", "docs/adr/0001.md", "LICENSE"], []),
        (["packages/fastvideo-vae-one/README.md", "fastvideo-vae-core/CHANGELOG.md"], []),
        (["tests/test_tools.py"], []),
        (["packages/fastvideo-vae-one/src/fastvideo_vae_one/model.py"], [ONE.name]),
        (["packages/fastvideo-vae-two/tests/test_parity.py", "packages/fastvideo-vae-one/pyproject.toml"], ALL[1:]),
        (["packages/fastvideo-vae-three/pyproject.toml"], []),
        (["fastvideo-vae-core/src/fastvideo_vae_core/vae.py"], ALL),
        (["packages/fastvideo-vae-one/src/a.py", "fastvideo-vae-core/src/b.py"], ALL),
        (["packages/fastvideo-vae-removed/src/a.py"], ALL),
        *(([path], ALL) for path in ("uv.lock", "pyproject.toml", "conftest.py", "tools/dev.py")),
        *(([path], ALL) for path in (".github/workflows/ci.yml", ".ci/run", ".pre-commit-config.yaml")),
    ],
)
def test_a_change_affects_what_it_can_break(changed: list[str], expected: list[str]) -> None:
    assert affected.affected(changed, MEMBERS) == expected


def test_an_unknown_base_affects_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert affected.changed_files("0" * 40) is None
    affected.main(["0" * 40])
    names = ", ".join(f'"{member.name}"' for member in workspace.installable_members())
    assert capsys.readouterr().out == f'{{"package": [{names}]}}\n'


def test_the_workspace_has_core_first_and_only_skeletons_without_a_build_system() -> None:
    found = workspace.members()
    assert found[0].name == "fastvideo-vae-core"
    assert [member.name for member in found if member.is_family] == [
        member.name for member in found if member.installable and member.families
    ]


def test_an_unknown_package_is_refused_with_those_there_are() -> None:
    with pytest.raises(SystemExit, match="no such package: fastvideo-vae-x; there are fastvideo-vae-core, "):
        workspace.select(["fastvideo-vae-x"])


@pytest.mark.parametrize("name", TOOLS)
def test_the_examples_in_the_tools_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize(
    "name", [name for name in TOOLS if name not in ("bench_tools", "demo_card", "demo_training", "workspace", "wheels")]
)
def test_a_tool_explains_itself(name: str) -> None:
    done = subprocess.run([sys.executable, f"tools/{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout


def test_an_unknown_command_is_refused_with_those_there_are() -> None:
    done = subprocess.run([sys.executable, "tools/dev.py", "tset"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "usage: " in done.stderr


@pytest.mark.parametrize(
    ("content", "faults"),
    [
        (b"", []),
        (b"x = 1\n", []),
        (b"\x89PNG \0 \r\n", []),
        (b"x = 1", ["a.py: the last line does not end"]),
        (b"x = 1 \ny\t\n", ["a.py:1: blanks at the end of the line", "a.py:2: blanks at the end of the line"]),
        (b"a\r\nb\r\n", ["a.py: lines end with a carriage return"]),
        (b"<<<<<<< ours\n=======\n>>>>>>> theirs\n", ["a.py:1: a conflict mark", "a.py:3: a conflict mark"]),
        (b"\0" * 3_200_001, ["a.py: 3200001 bytes, more than 3200000"]),
    ],
)
def test_hygiene(content: bytes, faults: list[str]) -> None:
    assert dev.hygiene("a.py", content) == faults


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(os.name == "nt", reason="this machine runs no shell scripts")
@pytest.mark.parametrize(("script", "usable"), [("echo uv 99.0.1", True), ("echo uv 0.1.0", False), ("exit 3", False)])
def test_a_uv_that_is_too_old_or_broken_is_not_used(tmp_path: Path, script: str, usable: bool) -> None:
    assert dev.is_new_enough(str(executable(tmp_path / "uv", script))) is usable
    assert not dev.is_new_enough(str(tmp_path / "absent"))


README = """
```sh
python3 tools/dev.py demo
```
Run the tests:

```sh
python3 tools/dev.py test
```
```sh
python3 tools/dev.py sync
```
"""


@pytest.mark.skipif(os.name == "nt", reason="this machine runs no shell scripts")
@pytest.mark.parametrize("failing", ["", "lint"])
def test_ci_run_takes_the_test_command_from_the_readme_and_stops_at_a_failure(tmp_path: Path, failing: str) -> None:
    (tmp_path / "README.md").write_text(README)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    executable(tmp_path / "bin/python3", f'echo "$@"; [ "$2" != "{failing}" ]')
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run([str(tmp_path / ".ci/run")], env=environment, capture_output=True, text=True)
    called = [line.removeprefix("tools/dev.py ") for line in done.stdout.splitlines()]
    assert called == (["test", "lint"] if failing else ["test", "lint", "types", "wheels"])
    assert (done.returncode == 0) is not bool(failing)


@pytest.mark.skipif(os.name == "nt", reason="this machine runs no shell scripts")
def test_ci_run_fails_without_a_test_command(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing\n")
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    done = subprocess.run([str(tmp_path / ".ci/run")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Run the tests" in done.stderr


def test_core_bound_is_one_minor_version() -> None:
    assert wheels.core_bound(CORE) == "fastvideo-vae-core>=0.1,<0.2"


def test_the_oldest_versions_are_asked_for_by_name() -> None:
    core = next(member for member in workspace.installable_members() if member.name == workspace.CORE)
    asked = list(isolated_test.third_party([core]))
    assert set(core.dependencies) <= set(asked)
    assert not any(requirement.startswith("fastvideo-vae-") for requirement in asked)


SOUND = {
    "fastvideo_vae_one/__init__.py": "",
    "fastvideo_vae_one/py.typed": "",
    "fastvideo_vae_one/demo.safetensors": "x" * 1000,
    "fastvideo_vae_one-0.1.0.dist-info/METADATA": (
        "Metadata-Version: 2.4\nName: fastvideo-vae-one\nVersion: 0.1.0\nLicense-Expression: Apache-2.0\n"
        "Requires-Python: >=3.11\nRequires-Dist: fastvideo-vae-core>=0.1,<0.2\n"
    ),
    "fastvideo_vae_one-0.1.0.dist-info/entry_points.txt": (
        "[fastvideo_vae_core.families]\none = fastvideo_vae_one.family:FAMILY\n"
    ),
    "fastvideo_vae_one-0.1.0.dist-info/licenses/LICENSE": "Apache",
}
METADATA = "fastvideo_vae_one-0.1.0.dist-info/METADATA"


def wheel_of(directory: Path, files: dict[str, str | None]) -> Path:
    path = directory / "fastvideo_vae_one-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (SOUND | files).items():
            if content is not None:
                archive.writestr(name, content)
    return path


def test_a_sound_wheel_has_no_fault(tmp_path: Path) -> None:
    assert wheels.faults(wheel_of(tmp_path, {}), ONE, CORE) == []


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"fastvideo_vae_one/py.typed": None}, "fastvideo_vae_one/py.typed is missing"),
        ({"fastvideo_vae_one-0.1.0.dist-info/licenses/LICENSE": None}, "licenses/LICENSE is missing"),
        ({"tests/test_model.py": ""}, "tests/test_model.py is outside fastvideo_vae_one/"),
        ({"fastvideo_vae_one/tests/test_model.py": ""}, "test_model.py does not belong into a wheel"),
        ({"fastvideo_vae_one/conftest.py": ""}, "conftest.py does not belong into a wheel"),
        ({"fastvideo_vae_one/demo.safetensors": "x" * 3_000_001}, "3000001 bytes of weights, more than 3000000"),
        ({"fastvideo_vae_one-0.1.0.dist-info/entry_points.txt": None}, "entry point one is missing"),
        ({METADATA: SOUND[METADATA].replace("Apache-2.0", "MIT")}, "License-Expression is MIT, not Apache-2.0"),
        ({METADATA: SOUND[METADATA].replace("<0.2", "<1")}, "which lacks exactly fastvideo-vae-core>=0.1,<0.2"),
        ({METADATA: SOUND[METADATA] + "Requires-Dist: x @ https://example.org/x\n"}, "names an address"),
        ({METADATA: SOUND[METADATA] + "Requires-Dist: diffusers>=0.39\n"}, "is a reference for tests"),
    ],
)
def test_a_faulty_wheel_is_refused(tmp_path: Path, files: dict[str, str | None], fault: str) -> None:
    assert any(fault in found for found in wheels.faults(wheel_of(tmp_path, files), ONE, CORE))


def test_core_may_not_bound_torch_from_above(tmp_path: Path) -> None:
    bounded = SOUND[METADATA].replace("fastvideo-vae-core>=0.1,<0.2", "torch>=2.11,<2.15")
    faults = wheels.faults(wheel_of(tmp_path, {METADATA: bounded}), ONE, CORE)
    assert any("which lacks exactly fastvideo-vae-core" in fault for fault in faults)
    core = Member(**{**vars(CORE), "families": {}})
    [fault] = wheels.metadata_faults(
        wheels.email.message_from_string(bounded.replace("vae-one", "vae-core")), core, core
    )
    assert fault == "requires torch>=2.11,<2.15, which lacks exactly torch>=2.11"


def changelog(root: Path, member: Member, heading: str) -> None:
    (root / member.path).mkdir(parents=True)
    (root / member.path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n\n## [0.0.9] - 2020-01-01\n")


@pytest.mark.parametrize(
    ("heading", "member_faults", "date_faults"),
    [
        ("## [0.1.0] - 2026-01-31", 0, 0),
        ("## [0.1.0] - unreleased", 0, 1),
        ("## [0.2.0] - 2026-01-31", 1, 0),
        ("## 0.1.0", 1, 0),
    ],
)
def test_versions_and_changelogs_agree(tmp_path: Path, heading: str, member_faults: int, date_faults: int) -> None:
    changelog(tmp_path, ONE, heading)
    assert len(list(release_check.member_faults(ONE, MEMBERS, tmp_path))) == member_faults
    assert len(list(release_check.date_faults(ONE, tmp_path))) == date_faults


def test_a_family_asks_for_the_core_beside_it(tmp_path: Path) -> None:
    changelog(tmp_path, ONE, "## [0.1.0] - unreleased")
    stale = Member(**{**vars(ONE), "dependencies": ("fastvideo-vae-core>=0.0,<0.1",)})
    [fault] = release_check.member_faults(stale, MEMBERS, tmp_path)
    assert fault.endswith("needs fastvideo-vae-core>=0.0,<0.1 and not fastvideo-vae-core>=0.1,<0.2")


def test_the_workspace_is_consistent() -> None:
    release_check.main([])


def test_a_tag_that_names_no_version_of_a_package_is_refused() -> None:
    with pytest.raises(SystemExit, match="is no NAME-vVERSION of fastvideo-vae-core"):
        release_check.main(["--tag", "fastvideo-vae-core-v99.0.0"])


@pytest.fixture
def empty_workspace(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "LICENSE", tmp_path)
    core, reserved = tmp_path / "fastvideo-vae-core", tmp_path / "packages/fastvideo-vae-later"
    core.mkdir()
    shutil.copy(ROOT / core.name / "pyproject.toml", core)
    reserved.mkdir(parents=True)
    skeleton = f'[project]\nname = "{reserved.name}"\nversion = "0.0.0"\n\n[tool.uv]\npackage = false\n'
    (reserved / "pyproject.toml").write_text(skeleton, encoding="utf-8")
    return tmp_path


def test_a_scaffolded_family_has_the_files_of_every_family_and_compiles(empty_workspace: Path) -> None:
    written = scaffold_family.scaffold("toy_kl", "AutoencoderToy", "toy autoencoder", empty_workspace)
    directory = empty_workspace / "packages/fastvideo-vae-toy-kl"
    assert {path.relative_to(directory).as_posix() for path in written} == {
        name.format(package="fastvideo_vae_toy_kl") for name in workspace.FAMILY_FILES
    }
    [toy] = [member for member in workspace.members(empty_workspace) if member.is_family]
    assert (toy.name, toy.families) == ("fastvideo-vae-toy-kl", {"toy_kl": "fastvideo_vae_toy_kl.family:FAMILY"})
    assert list(release_check.member_faults(toy, workspace.members(empty_workspace), empty_workspace)) == []
    for path in directory.rglob("*.py"):
        compile(path.read_text(encoding="utf-8"), str(path), "exec")


def test_scaffolding_fills_a_skeleton_and_refuses_a_family(empty_workspace: Path) -> None:
    scaffold_family.scaffold("later", "AutoencoderLater", "autoencoder of later", empty_workspace)
    with pytest.raises(SystemExit, match="fastvideo-vae-later exists already"):
        scaffold_family.scaffold("later", "AutoencoderLater", "autoencoder of later", empty_workspace)


@pytest.mark.parametrize(("family", "class_name"), [("../wan", "Wan"), ("Wan", "Wan"), ("wan", "class Wan")])
def test_scaffolding_refuses_names_that_python_does(empty_workspace: Path, family: str, class_name: str) -> None:
    with pytest.raises(SystemExit, match="must be names as in Python"):
        scaffold_family.scaffold(family, class_name, "title", empty_workspace)


@pytest.mark.slow
def test_a_scaffolded_family_keeps_the_contract(empty_workspace: Path) -> None:
    scaffold_family.scaffold("toy", "AutoencoderToy", "toy autoencoder", empty_workspace)
    directory = empty_workspace / "packages/fastvideo-vae-toy"
    information = directory / "src/fastvideo_vae_toy-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.4\nName: fastvideo-vae-toy\nVersion: 0.1.0\n")
    (information / "entry_points.txt").write_text(
        "[fastvideo_vae_core.families]\ntoy = fastvideo_vae_toy.family:FAMILY\n"
    )
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(directory), "-p", "no:cacheprovider"]
    tests = [str(directory / f"tests/test_{subject}.py") for subject in ("checkpoint", "conformance")]
    environment = {**os.environ, "PYTHONPATH": str(directory / "src")}
    command = [sys.executable, "-m", "pytest", *settings, *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
