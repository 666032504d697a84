"""Write the files of a new family: `python3 tools/scaffold_family.py wan --class-name AutoencoderKLWan --title "..."`.

They are the same files that every family has, around a placeholder network that loads and runs. The parity tests fail
until the real one is in its place, and the workspace's own tests until it has its line in the README and its demo.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

import wheels
from workspace import CORE, ROOT, installable_members, members

TEMPLATE = ROOT / "tools/family_template"
NEXT_STEPS = """
Next:
  1. uv lock && python3 tools/dev.py sync && uv run ruff check --fix packages
  2. put the network in model.py, its facts in config.py, the names of its tensors in checkpoint.py
  3. make tests/test_parity.py compare it with the official implementation
  4. train the miniature for the demo, name it in family.py, and give the family its line in README.md"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    for path in scaffold(options.family, options.class_name, options.title):
        print(path.relative_to(ROOT))
    print(NEXT_STEPS)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("family", help="name of the family, as `wan` or `autoencoder_kl`")
    parser.add_argument("--class-name", required=True, help="its model class, as `AutoencoderKLWan`")
    parser.add_argument("--title", required=True, help="what it is, as `causal video autoencoders of Wan`")
    return parser


def scaffold(family: str, class_name: str, title: str, root: Path = ROOT) -> list[Path]:
    """Write the family's files under `root`/packages; a skeleton of that name is filled, a real one refused."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", family) or not class_name.isidentifier():
        sys.exit(f"{family!r} and {class_name!r} must be names as in Python, the family in lower case")
    distribution = f"fastvideo-vae-{family.replace('_', '-')}"
    if any(member.name == distribution for member in installable_members(root)):
        sys.exit(f"{distribution} exists already")
    core = next(member for member in members(root) if member.name == CORE)
    names = {
        "family": family,
        "distribution": distribution,
        "package": f"fastvideo_vae_{family}",
        "class_name": class_name,
        "title": title,
        "core_bound": wheels.core_bound(core),
    }
    directory = root / "packages" / distribution
    return [*write_templates(directory, names), copy(root / "LICENSE", directory / "LICENSE")]


def write_templates(directory: Path, names: dict[str, str]) -> list[Path]:
    written = []
    for template in sorted(TEMPLATE.rglob("*.in")):
        relative = template.relative_to(TEMPLATE).as_posix().removesuffix(".in").replace("src/package", "src/$package")
        path = directory / Template(relative).substitute(names)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(template.read_text(encoding="utf-8")).substitute(names), encoding="utf-8")
        written.append(path)
    return written


def copy(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes())
    return target


if __name__ == "__main__":
    main()
