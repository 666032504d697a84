"""Where results go: decided and tried out before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastvideo_vae_core.errors import MediaError
from fastvideo_vae_core.media.files import atomic_output


def place(inputs: Sequence[Path], out: str, suffix: str, allowed: Sequence[str], *, writes: bool = True) -> list[Path]:
    """The output file of every input: `out` itself, or a file inside it where it is a folder or there are several.

    suffix: of the names that are chosen here; allowed: those that a name may have; writes: whether they are written
    here, and not by another rank.

    Raises:
        MediaError: two inputs would become one file, an output is an input, or it cannot be written.
    """
    folder = Path(out)
    if len(inputs) == 1 and not folder.is_dir() and not out.endswith(("/", "\\")):
        outputs = [folder]
    else:
        if writes:
            make_folder(folder)
        outputs = [folder / f"{path.stem}{suffix}" for path in inputs]
    for index, output in enumerate(outputs):
        if output in outputs[:index]:
            raise MediaError(f"{inputs[outputs.index(output)]} and {inputs[index]} would both become {output}")
        if output.suffix.lower() not in allowed:
            raise MediaError(f"{output} must end in {' or '.join(allowed)}")
        if writes:
            check_writable(output, inputs)
    return outputs


def make_folder(folder: Path) -> None:
    """Create a folder for outputs, with those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"cannot create the folder {folder}: {error.strerror}; choose another one") from error


def check_writable(output: Path, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output that cannot be written, or that would replace an input."""
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise MediaError(f"{output} is the input; choose another name for the output")
    try:
        with atomic_output(output):
            raise _OnlyTrying
    except _OnlyTrying:
        return


class _OnlyTrying(Exception):
    """Leaves `atomic_output` without a file."""
