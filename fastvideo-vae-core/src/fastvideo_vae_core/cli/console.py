"""What goes to the terminal: results to stdout as text or as one JSON document, remarks and progress to stderr."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

from fastvideo_vae_core.cli.parser import PROGRAM

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Console:
    """How to talk.

    Attributes:
        json: the result is one JSON document, and nothing else goes to stdout.
        quiet: no remarks and no progress bars.
        mute: nothing at all; of several ranks one speaks.
    """

    json: bool
    quiet: bool
    mute: bool = False

    @classmethod
    def of(cls, options: argparse.Namespace) -> Console:
        return cls(json=options.json, quiet=options.quiet, mute=not getattr(options, "speaks", True))

    def say(self, *lines: str) -> None:
        """A part of the result, for people."""
        if not self.json and not self.mute:
            _print("\n".join(lines), sys.stdout)

    def remark(self, text: str) -> None:
        """Something to know that is not the result."""
        if not self.quiet and not self.mute:
            _print(f"{PROGRAM}: {text}", sys.stderr)

    def finish(self, document: Any) -> None:
        """The result, for machines."""
        if self.json and not self.mute:
            print(json.dumps(_finite(document), indent=2, allow_nan=False))

    def progress(self, items: Sequence[Item], what: str) -> Iterator[Item]:
        """Go through items with a bar, where somebody watches and there is more than one."""
        if not self._watched or len(items) < 2:
            return iter(items)
        from tqdm import tqdm

        bar: Iterable[Item] = tqdm(items, desc=what, unit="file", file=sys.stderr)
        return iter(bar)

    @contextmanager
    def bar(self, total: int | None, what: str, unit: str | None) -> Iterator[Callable[[int], None]]:
        """A bar, where somebody watches and there is a unit; call what it gives with the units done so far."""
        if not self._watched or unit is None:
            yield lambda done: None
            return
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit=f" {unit}s", file=sys.stderr) as bar:
            yield lambda done: bar.update(done - bar.n)

    @contextmanager
    def units(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for one call of a network, where somebody watches; what it gives is the call's `progress`."""
        if not self._watched:
            yield lambda done, total: None
            return
        from tqdm import tqdm

        with tqdm(desc=what, unit=" unit", file=sys.stderr, leave=False) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield show

    @property
    def _watched(self) -> bool:
        return not (self.json or self.quiet or self.mute) and sys.stderr.isatty()


def _print(text: str, file: TextIO) -> None:
    """Print above a progress bar, if there is one."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=file)
    else:
        print(text, file=file)


def rows(pairs: Iterable[tuple[str, str]], indent: int = 0) -> list[str]:
    """Lines of a name and a value, the values below one another; a value of several lines keeps its column."""
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    gap = " " * (indent + width + 2)
    return [f"{' ' * indent}{name:<{width}}  {value}".replace("\n", f"\n{gap}").rstrip() for name, value in pairs]


def sizes(shape: Iterable[int]) -> str:
    """ "1 x 3 x 512 x 512"."""
    return " x ".join(map(str, shape))


def in_shell_words(message: str) -> str:
    """Advice that the library gives in Python, as options of this command."""
    for pattern, replacement in _SHELL_WORDS:
        message = re.sub(pattern, replacement, message)
    return message


_SHELL_WORDS = (
    (r", VAEConfig\(out_of_memory='raise'\) gives the error instead", ""),
    (r"memory_budget= to its plan", "--memory-budget, or --tile with a smaller tile"),
    (r"\bmemory_budget=(?=[ ,])", "--memory-budget"),
    (r"; a plan of your own, as plan_\w+ makes, runs nevertheless", "; --tile runs nevertheless"),
    (r"VAEConfig\((fp16)='(\w+)'\)", r"--\1 \2"),
    (r"\b(family|variant|component|fp16)='(\w+)'", r"--\1 \2"),
    (r", or use pad_to_valid\(\) and crop_to\(\)", ", or leave out --no-pad"),
)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: an identical picture has a PSNR of null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value
