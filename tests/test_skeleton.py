"""Every package has the same shape, keeps to its own imports, and names no machine and no package index."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import dev
from wheels import REFERENCES_ONLY
from workspace import CORE, FAMILY_FILES, PACKAGE_FILES, ROOT, Member, installable_members, members

MEMBERS = members()
INSTALLABLE = installable_members()
FAMILIES = [member for member in INSTALLABLE if member.is_family]

HOME_PATH = re.compile(r"(?<![\w.$*}])/(?:home|root|Users)/\w")
INDEX_ADDRESS = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|index-url\s*=|find-links\s*=")


@pytest.mark.parametrize("member", INSTALLABLE, ids=lambda member: member.name)
def test_a_package_has_the_common_files(member: Member) -> None:
    wanted = FAMILY_FILES if member.is_family else PACKAGE_FILES
    missing = [name for name in wanted if not (ROOT / member.path / name.format(package=member.import_name)).is_file()]
    assert not missing


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_directory_distribution_and_import_name_are_one(member: Member) -> None:
    assert member.path == (CORE if member.name == CORE else f"packages/{member.name}")
    found = [path.parent.name for path in (ROOT / member.path / "src").glob("*/__init__.py")]
    assert found == ([member.import_name] if member.installable else [])


@pytest.mark.parametrize("member", INSTALLABLE, ids=lambda member: member.name)
def test_the_licence_is_the_one_of_the_repository(member: Member) -> None:
    assert (ROOT / member.path / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("member", INSTALLABLE, ids=lambda member: member.name)
def test_runtime_code_keeps_to_its_own_imports(member: Member) -> None:
    others = {other.import_name for other in MEMBERS} - {
        member.import_name,
        *(["fastvideo_vae_core"] * member.is_family),
    }
    forbidden = others | set(REFERENCES_ONLY)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in (ROOT / member.path / "src").rglob("*.py")
        for name, line in imports(path)
        if name.partition(".")[0] in forbidden
    ]
    assert not wrong


def test_a_skeleton_has_no_code_and_says_so() -> None:
    """A name that is kept for a family to come; today there is none."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for member in (member for member in MEMBERS if not member.installable):
        files = {path.name for path in (ROOT / member.path).rglob("*") if path.is_file()}
        assert files == {"README.md", "pyproject.toml"}, member
        assert "Not implemented yet" in (ROOT / member.path / "README.md").read_text(encoding="utf-8"), member
        assert "package = false" in (ROOT / member.path / "pyproject.toml").read_text(encoding="utf-8"), member
        assert not re.search(rf"install.*{member.name}", readme), member


@pytest.mark.parametrize("member", FAMILIES, ids=lambda member: member.name)
def test_the_readme_names_every_family_that_can_be_installed(member: Member) -> None:
    assert member.name in (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_file_names_a_machine_or_a_package_index() -> None:
    here = [re.compile(re.escape(str(path)) + r"\b") for path in (ROOT, ROOT.parent / "shared") if len(path.parts) > 2]
    wrong = [
        f"{name}:{number}: {line.strip()}"
        for name, number, line in text_lines()
        if any(pattern.search(line) for pattern in (HOME_PATH, INDEX_ADDRESS, *here))
    ]
    assert not wrong


def text_lines() -> Iterator[tuple[str, int, str]]:
    """Every line of every text file but the lock, which must name the index, and this one, which names its prey."""
    try:
        names = dev.repository_files()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this copy of the repository is no git checkout")
    for name in names:
        content = (ROOT / name).read_bytes()
        if name in ("uv.lock", "tests/test_skeleton.py") or b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            yield name, number, line


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import in a file, wherever it stands, import_module("name") included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            named = node.args[0]
            if isinstance(named, ast.Constant) and isinstance(named.value, str):
                yield named.value, node.lineno
