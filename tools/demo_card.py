"""The README of a demo folder, and the list of where media for training come from, which stands in it.

    Card(class_name="AutoencoderKLWan", ...).write(output / "demo", run="10 steps in a minute")

Needs the standard library alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Card:
    """The README of a demo folder. All but names comes as lines of markdown.

    Attributes:
        described: what the model is.
        compared, table: on what its quality was measured and how, and the result.
        script, learns: the file in `tools`, and how its recipe goes on behind the name of the optimiser.
        example, shipped: the medium that ships beside it, and what it is.
        kind, sources: a title, and what it was and was not trained on.
    """

    class_name: str
    described: str
    compared: str
    table: str
    script: str
    learns: str
    example: str
    shipped: str
    kind: str
    sources: str

    def write(self, folder: Path, run: str) -> None:
        """Into a demo folder; `run` says what was done."""
        (folder / "README.md").write_text(_CARD.format(run=run, **vars(self)), encoding="utf-8")


def write_sources(folder: Path, listed: Sequence[Mapping[str, Any]]) -> None:
    """Where the media in a folder come from: of each at least name, held_out, licence and credit."""
    (folder / "sources.json").write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_sources(folder: Path) -> list[dict[str, Any]]:
    """What `write_sources` wrote."""
    listed: list[dict[str, Any]] = json.loads((folder / "sources.json").read_text(encoding="utf-8"))
    return listed


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In markdown.

    >>> print(table(("name", "by"), [("astronaut", "NASA")]))
    | name | by |
    |---|---|
    | astronaut | NASA |
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (titles, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(titles), *lines[1:]])


Cells = Callable[[Mapping[str, Any]], Sequence[str]]
SOURCE_TITLES = ("name", "from", "licence", "by")


def source_cells(entry: Mapping[str, Any]) -> Sequence[str]:
    return entry["name"], entry["package"], entry["licence"], entry["credit"]


def source_table(
    listed: Sequence[Mapping[str, Any]],
    titles: Sequence[str] = SOURCE_TITLES,
    cells: Cells = source_cells,
    *,
    held_out: bool = False,
) -> str:
    """Of what was trained on, or of what was held out."""
    return table(titles, [cells(each) for each in listed if each["held_out"] is held_out])


def source_tables(
    listed: Sequence[Mapping[str, Any]], titles: Sequence[str] = SOURCE_TITLES, cells: Cells = source_cells
) -> str:
    """Of both, with a line between."""
    trained, held_out = (source_table(listed, titles, cells, held_out=each) for each in (False, True))
    return f"{trained}\n\nHeld out:\n\n{held_out}"


def credit_of(name: str, listed: Sequence[Mapping[str, Any]]) -> str:
    """Whose what ships is, and under which licence."""
    shipped = next(each for each in listed if each["name"] == name)
    return f"{shipped['credit']}; {shipped['licence']}."


_CARD = """\
# A miniature {class_name}

{described}

## How well it does

{compared}

{table}

## How it was trained

By `tools/{script}`:
{run}
The recipe stands at the top of that file: AdamW, {learns}

## {example}

{shipped}

## {kind}

{sources}
"""
