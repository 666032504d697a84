"""The commands and their options. Nothing here imports torch: `--help` must be quick."""

from __future__ import annotations

import argparse
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn, get_args

from fastvideo_vae_core.config import Dtype, Fp16Policy

PROGRAM = "fastvideo-vae"

_COMMANDS = "fastvideo_vae_core.cli"


def build_parser() -> argparse.ArgumentParser:
    """The parser; `options.run` names the function "module:name" that takes the parsed options."""
    parser = _Parser(
        prog=PROGRAM,
        description="Compress pictures, video and sound to latents and back, with the autoencoders that are installed.",
        epilog=f"Start with `{PROGRAM} demo`. `{PROGRAM} COMMAND --help` tells the options of a command.",
    )
    parser.add_argument("-V", "--version", action=_Version, nargs=0, help="print the version of fastvideo-vae-core")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for add in (_add_demo, _add_roundtrip, _add_encode, _add_decode, _add_inspect, _add_families, _add_doctor):
        _add_common(add(commands))
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error of this command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message}; see `{self.prog} --help`\n")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"{PROGRAM} {version('fastvideo-vae-core')}")
        sys.exit(0)


def _add_demo(commands: Any) -> argparse.ArgumentParser:
    parser = _command(commands, "demo", "roundtrip:demo", "see a photograph, clip or recording go through a miniature")
    parser.add_argument("--family", help="whose miniature (default: the first installed family that ships one)")
    parser.add_argument(
        "--output", "-o", type=Path, default=Path("demo-output"), metavar="DIR", help="where (default: ./demo-output)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    return parser


def _add_roundtrip(commands: Any) -> argparse.ArgumentParser:
    parser = _command(commands, "roundtrip", "roundtrip:roundtrip", "encode and decode a file, and measure the loss")
    parser.add_argument("input", type=Path, metavar="INPUT")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="the reconstruction; the picture that compares it lands beside it as OUT's stem + -comparison.png",
    )
    _add_model(parser)
    _add_execution(parser)
    _add_sampling(parser)
    sound = _add_video(parser).add_mutually_exclusive_group()
    sound.add_argument("--no-sound", action="store_true", help="leave out the sound of the input")
    sound.add_argument(
        "--keep-sound", action="store_true", help="the input's own sound, also where the checkpoint has models of sound"
    )
    _add_sound(parser)
    return parser


def _add_encode(commands: Any) -> argparse.ArgumentParser:
    parser = _command(commands, "encode", "codec:encode", "media to latent files")
    parser.add_argument("inputs", type=Path, nargs="+", metavar="INPUT")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="a .safetensors file, or a folder for several inputs"
    )
    parser.add_argument(
        "--normalized", action="store_true", help="store the latents as the diffusion model sees them, not raw"
    )
    _add_model(parser)
    _add_execution(parser)
    _add_sampling(parser)
    _add_sound(parser)
    return parser


def _add_decode(commands: Any) -> argparse.ArgumentParser:
    parser = _command(commands, "decode", "codec:decode", "latent files back to media")
    parser.add_argument("inputs", type=Path, nargs="+", metavar="LATENT")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="a media file, or a folder for several inputs"
    )
    parser.add_argument(
        "--force", action="store_true", help="decode latents that another family or checkpoint made, with a warning"
    )
    _add_model(parser)
    _add_execution(parser)
    video = _add_video(parser)
    video.add_argument("--sound", type=Path, metavar="FILE", help="a file whose sound goes with the pictures")
    video.add_argument("--frame-rate", type=_rate, metavar="RATE", help="such as 24 or 24000/1001, if not the latents'")
    return parser


def _add_inspect(commands: Any) -> argparse.ArgumentParser:
    parser = _command(commands, "inspect", "inspect:run", "tell what a checkpoint or latent file holds")
    parser.add_argument("source", metavar="SOURCE", help="a file, a directory, or a hub id owner/name")
    _add_place(parser)
    return parser


def _add_families(commands: Any) -> argparse.ArgumentParser:
    return _command(commands, "families", "families:run", "list the installed families")


def _add_doctor(commands: Any) -> argparse.ArgumentParser:
    return _command(commands, "doctor", "doctor:run", "check the installation")


def _command(commands: Any, name: str, run: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=f"{summary}.".capitalize())
    parser.set_defaults(run=f"{_COMMANDS}.{run}")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    group.add_argument("--quiet", "-q", action="store_true", help="no progress bars and no remarks")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="SOURCE", help="a file, a directory, or a hub id owner/name (default: the shipped miniature)"
    )
    group.add_argument("--family", help="recognised when not given, checked when given")
    group.add_argument("--variant", help="published checkpoint such as sdxl, where the tensors leave it open")
    group.add_argument("--component", help="one network of a checkpoint that holds several")
    _add_place(group)
    group.add_argument("--config", type=Path, metavar="FILE", help="a diffusers config.json for weights without one")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    group.add_argument("--dtype", choices=get_args(Dtype), help="type of the weights (default: as they are stored)")
    group.add_argument(
        "--fp16",
        choices=get_args(Fp16Policy),
        default="auto",
        help="what float16 weights do about overflow: compute in float32 (upcast), or again in float32 when the result"
        " is not finite (retry); auto does what the checkpoint asks for",
    )


def _add_place(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--subfolder", help="of the directory or hub repository")
    parser.add_argument("--revision", help="of the hub repository")


def _add_execution(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("execution")
    tiles = group.add_mutually_exclusive_group()
    tiles.add_argument("--tiling", action="store_true", help="compute in tiles, the same result; holds a whole clip")
    tiles.add_argument("--tile", type=_positive, nargs=2, metavar=("H", "W"), help="tiles of that size, in pixels")
    group.add_argument("--memory-budget", metavar="SIZE", help="the quickest way that fits, such as 6GiB or 500MB")
    group.add_argument("--plan", action="store_true", help="print how it is computed, and the predicted peak of memory")
    group.add_argument(
        "--timeout",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="on several devices, which torchrun starts: how long they wait for each other (default: 300)",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("latents")
    group.add_argument("--sample", action="store_true", help="draw from the posterior instead of taking its mode")
    group.add_argument("--seed", type=int, default=0, help="of --sample (default: 0)")
    group.add_argument("--no-pad", action="store_true", help="refuse sizes that the model cannot take, do not pad them")


def _add_video(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("video")
    group.add_argument(
        "--crf", type=int, choices=range(52), metavar="0-51", help="loss of the encoder; 0 is least (default: 16)"
    )
    return group


def _add_sound(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sound")
    group.add_argument("--downmix", action="store_true", help="mix more channels than the model has down to those")


def _rate(text: str) -> Fraction:
    rate = Fraction(text)
    if rate <= 0:
        raise ValueError(text)
    return rate


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 1e6:
        raise ValueError(text)
    return seconds


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
