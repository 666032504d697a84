"""The workflows, the pre-commit hooks and .ci/run call only what exists, with arguments that it takes."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import dev
from workspace import ROOT, installable_members

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FLOATING_MAJOR = re.compile(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)")
TOOL_CALL = re.compile(r"python3? (tools/\w+\.py)([^\n)]*)")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_asks_for_least_and_ends(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert "concurrency" in workflow or "workflow_call" in workflow["on"]
    for name, job in workflow["jobs"].items():
        assert "uses" in job or job["timeout-minutes"] <= 60, f"{name} may run for hours"
        assert set(job.get("permissions", {})) <= {"id-token"}, f"{name} asks for more than it needs"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_and_workflow_it_uses_exists_or_has_a_major_version(path: Path) -> None:
    workflow = read(path)
    for used in [
        *(job.get("uses") for job in workflow["jobs"].values()),
        *(step.get("uses") for step in steps(workflow)),
    ]:
        if used and used.startswith("./"):
            assert "workflow_call" in read(ROOT / used)["on"]
        elif used:
            assert FLOATING_MAJOR.fullmatch(used), f"{used} follows no major version"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_command_of_a_workflow_exists(path: Path) -> None:
    calls = [call for step in steps(read(path)) for call in tool_calls(step.get("run", ""))]
    assert calls
    for tool, arguments in calls:
        check_call(tool, arguments)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_name_in_an_expression_is_declared(path: Path) -> None:
    workflow = read(path)
    text = path.read_text(encoding="utf-8")
    declared = {
        "inputs": set((workflow["on"].get("workflow_call") or {}).get("inputs", {}))
        if isinstance(workflow["on"], dict)
        else set(),
        "matrix": {"package", *(key for job in workflow["jobs"].values() for key in matrix_of(job))},
        "needs": set(workflow["jobs"]),
    }
    for context, names in declared.items():
        assert set(re.findall(rf"\b{context}\.([\w-]+)", text)) <= names
    for job in workflow["jobs"].values():
        needed = job.get("needs", [])
        assert {needed} if isinstance(needed, str) else set(needed) <= set(workflow["jobs"])


def test_ci_hands_the_reusable_workflow_what_it_requires() -> None:
    job = read(ROOT / ".github/workflows/ci.yml")["jobs"]["package"]
    wanted = read(ROOT / job["uses"])["on"]["workflow_call"]["inputs"]
    assert set(job["with"]) == {name for name, field in wanted.items() if field["required"]}


def test_tests_run_on_every_supported_python_with_the_newest_and_the_oldest_versions() -> None:
    matrix = read(ROOT / ".github/workflows/package.yml")["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix == {"python": ["3.11", "3.12", "3.13"], "resolution": ["locked", "lowest-direct"]}


def test_the_release_publishes_the_files_that_it_tested() -> None:
    build = read(ROOT / ".github/workflows/release.yml")["jobs"]["build"]["steps"]
    commands = " ".join(step.get("run", "") for step in build)
    assert commands.count("uv build") == 1
    assert commands.index("uv build") < commands.index("wheels")
    assert all(
        "dist/" in line for step in build if "path" in step.get("with", {}) for line in step["with"]["path"].split()
    )


def test_a_release_tag_of_every_package_starts_the_release() -> None:
    [pattern] = read(ROOT / ".github/workflows/release.yml")["on"]["push"]["tags"]
    assert all(Path(f"{member.name}-v{member.version}").match(pattern) for member in installable_members())


def test_the_hooks_call_what_ci_calls() -> None:
    hooks = [hook for repo in read(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    ours = {call for hook in hooks for call in tool_calls(hook["entry"])}
    theirs = {call for path in WORKFLOWS for step in steps(read(path)) for call in tool_calls(step.get("run", ""))}
    assert ours
    assert ours <= theirs


def test_ci_run_calls_commands_that_exist() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    calls = tool_calls(script.read_text(encoding="utf-8"))
    assert [arguments for _, arguments in calls] == [("lint",), ("types",), ("wheels",)]
    for tool, arguments in calls:
        check_call(tool, arguments)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "RELEASING.md"])
def test_every_tool_and_command_that_the_prose_names_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert all((ROOT / tool).is_file() for tool in re.findall(r"tools/\w+\.py", text))
    assert set(re.findall(r"tools/dev\.py (\w+)", text)) <= set(dev.COMMANDS)


def check_call(tool: str, arguments: tuple[str, ...]) -> None:
    """Parse the arguments as the tool itself will, where dev.py passes them on to another one."""
    assert (ROOT / tool).is_file(), f"{tool} does not exist"
    name = Path(tool).stem
    if name == "dev":
        command, *arguments_left = arguments
        assert command in dev.COMMANDS, f"tools/dev.py has no command {command}"
        passed_on = {"isolated": "isolated_test", "wheels": "wheel_test"}
        if command not in passed_on:
            return
        name, arguments = passed_on[command], tuple(arguments_left)
    importlib.import_module(name).parser().parse_args(arguments)


def tool_calls(script: str) -> list[tuple[str, tuple[str, ...]]]:
    """(tool, arguments) of every call of a Python tool in a shell script; expressions stand as one word.

    For example "python tools/dev.py isolated $P --resolution ${{ matrix.resolution }}" with "locked" for the last.
    """
    plain = re.sub(r"\$\{\{[^}]*\}\}", "locked", script)
    return [(tool, tuple(shlex.split(arguments))) for tool, arguments in TOOL_CALL.findall(plain)]


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job.get("steps", [])


def matrix_of(job: dict[str, Any]) -> list[str]:
    matrix = job.get("strategy", {}).get("matrix", {})
    return list(matrix) if isinstance(matrix, dict) else []


def read(path: Path) -> dict[str, Any]:
    """A YAML file; its `on` key, which YAML 1.1 takes for a truth value, has its name back."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in document.items()}
