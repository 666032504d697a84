"""Do version, changelog, bounds, tag and wheels agree? `python3 tools/release_check.py` looks at every package.

With `--tag fastvideo-vae-wan-v0.2.0` it also asks that this very release is ready, and with `--dist` that its wheel is.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import wheels
from workspace import CORE, ROOT, Member, installable_members


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    members = installable_members()
    found = [fault for member in members for fault in member_faults(member, members)]
    released = members
    if options.tag:
        released = [member for member in members if options.tag == f"{member.name}-v{member.version}"]
        found += [fault for member in released for fault in date_faults(member)]
        if not released:
            found.append(f"{options.tag} is no NAME-vVERSION of {', '.join(f'{m.name} {m.version}' for m in members)}")
    if options.dist:
        core = next(member for member in members if member.name == CORE)
        for member in released:
            found += wheels.faults(wheels.find_wheel(options.dist, member), member, core)
    if found:
        sys.exit("\n".join(found))
    print("\n".join(member.name for member in released))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tag", help="the tag of the release; prints the package that it names")
    parser.add_argument("--dist", type=Path, help="directory that holds the wheels")
    return parser


def member_faults(member: Member, members: Sequence[Member], root: Path = ROOT) -> Iterator[str]:
    version, _ = newest_entry(member, root)
    if version != member.version:
        yield f"{member.name}: the newest entry of CHANGELOG.md is {version}, the version is {member.version}"
    bound = wheels.core_bound(next(other for other in members if other.name == CORE))
    if member.is_family and bound not in member.dependencies:
        yield f"{member.name}: needs {', '.join(member.dependencies)} and not {bound}"


def date_faults(member: Member, root: Path = ROOT) -> Iterator[str]:
    _, date = newest_entry(member, root)
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date):
        yield f"{member.name}: CHANGELOG.md says {date} where the date of the release stands"


def newest_entry(member: Member, root: Path) -> tuple[str, str]:
    """Version and date of the first entry: "## [0.1.0] - 2026-01-31" or "## [0.1.0] - unreleased"."""
    text = (root / member.path / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(r"^## \[([^\]]+)\] - (\S+)$", text, re.MULTILINE)
    return (found.group(1), found.group(2)) if found else ("none", "nothing")


if __name__ == "__main__":
    main()
