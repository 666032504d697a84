"""Entry of the command line: run one command and turn whatever happens into an exit code and one line.

Exit codes: 0 done; 1 unexpected, or `doctor` or `inspect` found something wrong; 2 an error that the user can mend;
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from fastvideo_vae_core.cli.console import in_shell_words
from fastvideo_vae_core.cli.parser import PROGRAM, build_parser
from fastvideo_vae_core.errors import VAEError
from fastvideo_vae_core.family import load_object


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = build_parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning if os.environ.get("RANK", "0") == "0" else _show_nothing
        try:
            code = _run(options)
            sys.stdout.flush()
        except KeyboardInterrupt:
            return _failed(options.debug, "interrupted", 130)
        except BrokenPipeError:
            # Whoever read the output has had enough. Python would complain when it flushes stdout on its way out.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except VAEError as error:
            return _failed(options.debug, f"error: {in_shell_words(str(error))}", 2)
        except Exception as error:
            return _failed(options.debug, f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1)
    return code


def _run(options: argparse.Namespace) -> int:
    """The command; where torchrun has started it several times, together with the others."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in names) or os.environ["WORLD_SIZE"] == "1":
        return int(load_object(options.run)(options))
    options.speaks = os.environ["RANK"] == "0"
    if not hasattr(options, "timeout"):
        # There is nothing to compute together.
        return int(load_object(options.run)(options)) if options.speaks else 0
    from fastvideo_vae_core.cli.together import together

    with together(options):
        return int(load_object(options.run)(options))


def _failed(debug: bool, message: str, code: int) -> int:
    if debug:
        traceback.print_exc()
    print(_line(message), file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(_line(f"warning: {in_shell_words(str(message))}"), file=sys.stderr)


def _show_nothing(*_: Any, **__: Any) -> None:
    """The first rank says it."""


def _line(message: str) -> str:
    return f"{PROGRAM}: {' '.join(part.strip() for part in message.splitlines())}"


if __name__ == "__main__":
    raise SystemExit(main())
