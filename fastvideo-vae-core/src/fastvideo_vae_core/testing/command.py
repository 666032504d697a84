"""Running the command line as a person would, in the process of the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastvideo_vae_core.cli.__main__ import main


class Ran(NamedTuple):
    """What a command gave: its exit code, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document that --json printed."""
        return json.loads(self.out)

    def assert_fails(self, *words: str, code: int = 2) -> None:
        """One line on stderr with these words, and nothing on stdout."""
        assert (self.code, self.out) == (code, ""), self.err
        [line] = self.err.splitlines()
        assert line.startswith("fastvideo-vae: ")
        for word in words:
            assert word in line, line


class Command:
    """`Command(capsys)("encode", "photo.png", "-o", "photo.safetensors")` runs it in the working directory.

    Whatever happens, no temporary file may be left there.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Ran:
        self._capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = self._capsys.readouterr()
        assert not [path for path in Path.cwd().rglob(".*") if path.is_file()], "a temporary file is left"
        return Ran(code, captured.out, captured.err)
