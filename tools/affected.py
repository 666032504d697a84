"""Which packages must CI check after a change? `python3 tools/affected.py BASE` prints them as a JSON matrix.

A change to core reaches every family, a change to a family only itself. Prose reaches no package, and neither do the
tests at the root, which CI runs on every change. Everything else is shared: settings, lock file, tools, workflows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterable, Sequence

from workspace import CORE, ROOT, Member, members


def main(arguments: Sequence[str] | None = None) -> None:
    base = parser().parse_args(arguments).base
    known = members()
    changed = changed_files(base)
    print(json.dumps({"package": affected(changed, known) if changed is not None else installable(known)}))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", help="git reference that the change is measured against")
    return parser


def affected(changed: Iterable[str], known: Sequence[Member]) -> list[str]:
    """The installable packages that these files, named from the root, can break.

    For example {"packages/fastvideo-vae-wan/src/fastvideo_vae_wan/model.py"} -> ["fastvideo-vae-wan"].
    """
    reached: set[str] = set()
    for path in changed:
        owner = next((member.name for member in known if path.startswith(f"{member.path}/")), None)
        if is_prose(path) or path.startswith("tests/"):
            continue
        if owner is None or owner == CORE:
            return installable(known)
        reached.add(owner)
    return [name for name in installable(known) if name in reached]


def is_prose(path: str) -> bool:
    return path.endswith(".md") or path.startswith("docs/") or path in ("LICENSE", ".gitignore")


def installable(known: Sequence[Member]) -> list[str]:
    return [member.name for member in known if member.installable]


def changed_files(base: str) -> list[str] | None:
    """The files that differ from where this branch left `base`; None when git cannot tell, as on a first push."""
    command = ["git", "diff", "--name-only", "--no-renames", "-z", f"{base}...HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.split("\0")[:-1] if done.returncode == 0 else None


if __name__ == "__main__":
    main()
