"""What the training of every miniature shares: its options, a folder that is never lost, a schedule by the clock.

A run saves itself every minute, so that a machine that is taken away takes at most a minute with it, and another run
goes on from there with `--start`. A folder holds

    demo/              what ships, as of the last time
    state.safetensors  the averaged weights in float32, from which another run goes on
    run.txt            what was done so far, over all runs
    log.txt
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastvideo_vae_core.config import VAEArchConfig, VAEConfig
from fastvideo_vae_core.distribution import DiagonalGaussianDistribution

# A little less than the three megabytes that a package may carry.
LARGEST_WEIGHTS_BYTES = 2_980_000
SAVE_SECONDS = 60
WEIGHTS, STATE, DONE = "diffusion_pytorch_model.safetensors", "state.safetensors", "run.txt"

M = TypeVar("M", bound=nn.Module)
# From the model, a batch and weights to the loss and to what the log is told.
Objective = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How a miniature learns.

    Attributes:
        warm_up: share of the time in which the learning rate rises, before it falls along a cosine.
        averaging: how much of the moving average of the weights stays at each step.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-3
    warm_up: float = 0.03
    largest_gradient: float = 1.0
    averaging: float = 0.999


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a run goes, as the command line says.

    Attributes:
        minutes: for everything, from start to end; `reserve`: seconds of them that are kept for measuring.
        start: the output of another run, to go on from.
        measured: whether the held-out examples are measured and the README is written, or by `measure` later.
    """

    output: Path
    minutes: float
    reserve: float
    device: str
    compiled: bool
    measured: bool
    start: Path | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> Way:
        return cls(
            output=options.output,
            minutes=options.minutes,
            reserve=options.reserve if options.measured else min(options.reserve, _CLOSING_SECONDS),
            device=options.device,
            compiled=options.compiled,
            measured=options.measured,
            start=options.start,
        )


def command_line(doc: str | None) -> tuple[argparse.ArgumentParser, Any]:
    """A parser for the script that explains itself so, and what its steps are added to."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    return parser, parser.add_subparsers(dest="step", required=True)


def add_steps(
    steps: Any,
    data: Mapping[str, str],
    *,
    recipes: Sequence[str],
    minutes: float,
    reserve: float,
    suffix: str = "",
    compiles: bool = True,
) -> None:
    """The steps `train` and `measure` of a command line; `data` names the folders that both take, and explains them.

    The first of the recipes is the one that wants a GPU.
    """
    training = steps.add_parser(f"train{suffix}", help="train, measure and write the demo folder")
    measuring = steps.add_parser(f"measure{suffix}", help="measure what a run has saved, and write its README")
    for step in (training, measuring):
        for name, explanation in data.items():
            step.add_argument(f"--{name}", type=Path, required=True, help=explanation)
        step.add_argument("--output", type=Path, required=True, help="folder of the run")
        step.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    training.add_argument("--minutes", type=float, default=minutes, help="for everything, from start to end")
    training.add_argument("--reserve", type=float, default=reserve, help="seconds of them that are kept for measuring")
    training.add_argument("--no-measure", dest="measured", action="store_false", help=f"do `measure{suffix}` later")
    training.set_defaults(compiled=compiles)
    if compiles:
        training.add_argument("--no-compile", dest="compiled", action="store_false", help="do without torch.compile")
    training.add_argument("--recipe", choices=recipes, default=recipes[0], help=f"{recipes[0]} wants a GPU")
    training.add_argument("--start", type=Path, help="folder of another run, to go on from")


class Log:
    """Lines on the screen and in a file, each with the seconds since the start."""

    def __init__(self, path: Path) -> None:
        self.path, self.started = path, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, text: str) -> None:
        line = f"[{time.monotonic() - self.started:6.1f} s] {text}"
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Run(Generic[M]):
    """A training in a folder.

    `write` puts the files that ship into a folder, from the averaged weights, and is told whether it is the last time.
    `tell` says what so many steps are.
    """

    def __init__(
        self, way: Way, how: Optimisation, write: Callable[[M, Path, bool], None], tell: Callable[[int], str]
    ) -> None:
        self.way, self.how, self.write, self.tell = way, how, write, tell
        self.log = Log(way.output / "log.txt")
        self.deadline = self.log.started + 60 * way.minutes - way.reserve
        self.before = ""
        if way.start is not None:
            self.before = f"{(way.start / DONE).read_text(encoding='utf-8')}; then "
        torch.backends.cudnn.benchmark = True

    def begin(self, model: M, stored: Callable[[Path], nn.Module], largest: int = LARGEST_WEIGHTS_BYTES) -> M:
        """The model on its device, with the weights of the run to go on from.

        `stored` reads a demo folder: where nothing but what ships is left of a run, its rounded weights have to do.
        """
        start = self.way.start
        if start is not None:
            exact = (start / STATE).exists()
            model.load_state_dict(load_file(start / STATE) if exact else stored(start / "demo").state_dict())
        count = parameter_count(model, largest)
        self.log(f"{self.how}\n{count} parameters, torch {torch.__version__}, {self.way.device}, {self.way}")
        return model.to(self.way.device)

    def save(self, averaged: M, steps: int, *, last: bool) -> None:
        """Everything, first beside what is there already, so that at any time one of the two is whole."""
        fresh, output = self.way.output / "saving", self.way.output
        for folder in (fresh, output / "demo"):
            folder.mkdir(parents=True, exist_ok=True)
        self.write(averaged, fresh, last)
        for path in fresh.iterdir():
            os.replace(path, output / "demo" / path.name)
        state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in averaged.state_dict().items()}
        save_file(state, fresh / STATE)
        where = torch.cuda.get_device_name() if self.way.device.startswith("cuda") else "CPU"
        minutes = (time.monotonic() - self.log.started) / 60
        by = f"on one {where} with torch {torch.__version__}, {date.today().isoformat()}"
        done = f"{self.before}{self.tell(steps)} in {minutes:.1f} minutes, {by}"
        (fresh / DONE).write_text(done, encoding="utf-8")
        for path in fresh.iterdir():
            os.replace(path, output / path.name)
        fresh.rmdir()


class Trainer(Generic[M]):
    """AdamW until a deadline, on a schedule by the clock, with a moving average of the weights, saved now and then.

    Attributes:
        averaged: the model with the averaged weights, which is the result.
        steps, passed: how many there were, and the share of the time that is over.
    """

    def __init__(self, model: M, run: Run[M]) -> None:
        self.run, self.how, self.begun = run, run.how, time.monotonic()
        self.saved = self.begun
        self.parameters: list[Tensor] = list(model.parameters())
        self.averaged = copy.deepcopy(model).requires_grad_(False)
        self.averages: list[Tensor] = list(self.averaged.parameters())
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            betas=self.how.betas,
            weight_decay=self.how.weight_decay,
            fused=self.parameters[0].is_cuda,
        )
        self.steps, self.passed = 0, 0.0

    def step(self, loss: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.how.learning_rate * schedule(self.passed, self.how.warm_up)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.how.largest_gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        stays = min(self.how.averaging, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - stays)
        now = time.monotonic()
        self.passed = (now - self.begun) / (self.run.deadline - self.begun)
        if now - self.saved > SAVE_SECONDS:
            self.run.save(self.averaged, self.steps, last=False)
            self.saved = time.monotonic()

    def finish(self) -> M:
        """Save for the last time; the averaged model."""
        self.run.save(self.averaged, self.steps, last=True)
        self.run.log(f"trained for {self.steps} steps")
        return self.averaged


class Progress:
    """A line of the log every few steps; it waits for the device, so that its clock and ours do not drift apart.

    `tell` makes the line from the means of what was measured since the last one, and from the steps per second.
    """

    def __init__(self, tell: Callable[[Sequence[float], float], str], log: Log, *, every: int) -> None:
        self.tell, self.log, self.every = tell, log, every
        self.since, self.rows = time.monotonic(), list[Tensor]()

    def __call__(self, measured: Tensor, trainer: Trainer[Any]) -> None:
        """`measured` holds a number, or several in a row."""
        self.rows.append(measured.detach().reshape(-1))
        if len(self.rows) < self.every:
            return
        means = torch.stack(self.rows).mean(0).tolist()
        if not all(math.isfinite(mean) for mean in means):
            sys.exit(f"the loss is no longer finite at step {trainer.steps}; lower the learning rate")
        now = time.monotonic()
        told = self.tell(means, self.every / (now - self.since))
        self.log(f"step {trainer.steps}, {trainer.passed:.0%} of the time, {told}")
        self.since = now
        self.rows.clear()


def schedule(passed: float, warm_up: float) -> float:
    """Share of the highest learning rate after a share of the time.

    >>> [round(schedule(passed, 0.1), 3) for passed in (0.0, 0.05, 0.1, 0.55, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if passed < warm_up:
        return passed / warm_up
    return (1 + math.cos(math.pi * min(1.0, (passed - warm_up) / (1 - warm_up)))) / 2


def told_of(pixels: int) -> Callable[[Sequence[float], float], str]:
    """For the log of steps of so many pixels: what a mean squared error in [-1, 1] is, and how fast training goes."""

    def tell(means: Sequence[float], steps_per_second: float) -> str:
        return f"training PSNR {10 * math.log10(4 / means[0]):.2f} dB, {steps_per_second * pixels / 1e6:.2f} Mpixel/s"

    return tell


def picture_loss(
    made: Tensor, x: Tensor, posterior: DiagonalGaussianDistribution, weights: Tensor, kl: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of pictures (..., H, W), and the mean squared error in it.

    weights: of the absolute errors of pixels and of their differences in space.
    kl: weight of the Kullback-Leibler divergence per latent value.
    """
    error = made - x
    squared = error.square().mean()
    slopes = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    return squared + weights[0] * error.abs().mean() + weights[1] * slopes + kl * divergence, squared.detach()


# That in words, for a README.
LEARNS_PICTURES = """\
mean squared error with small weights on the absolute errors of pixels
and of their differences in the first stage, a small Kullback-Leibler term, and a moving average of the weights."""


class Dice:
    """What is drawn at random for crops of pictures, the same in every run."""

    def __init__(self, seed: int, device: str | torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def choose(self, chances: Tensor, count: int) -> Tensor:
        return torch.multinomial(chances, count, replacement=True, generator=self.generator)

    def uniform(self, count: int, low: float, high: float) -> Tensor:
        unit = torch.rand(count, generator=self.generator, device=self.generator.device)
        return low + (high - low) * unit

    def coins(self, count: int, chance: float) -> Tensor:
        return self.uniform(count, 0, 1) < chance

    def recoloured(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, ...) with channels in another order, and other saturation, contrast and brightness."""
        batch, ones = len(x), (1,) * (x.dim() - 2)
        order = torch.rand(batch, 3, generator=self.generator, device=x.device).argsort(1)
        x = x.gather(1, order.view(batch, 3, *ones).expand_as(x))
        grey = x.mean(1, keepdim=True)
        saturation, contrast, brightness = (
            self.uniform(batch, low, high).view(batch, 1, *ones) for low, high in ((0.5, 1.5), (0.7, 1.3), (-0.2, 0.2))
        )
        return ((grey + (x - grey) * saturation) * contrast + brightness).clamp(-1, 1)


def compiled_or_plain(
    objective: Objective, examples: Mapping[str, tuple[Any, ...]], model: nn.Module, log: Log
) -> Objective:
    """The objective compiled for every example of its arguments, if it compiles and agrees with the plain one.

    It is several times as fast, and training goes on without it whatever the compiler meets on a machine.
    """
    try:
        compiled: Objective = torch.compile(objective, dynamic=False)
        for name, arguments in examples.items():
            for _ in range(2):
                loss, _ = compiled(*arguments)
                loss.backward()
            ratio = float(loss.detach() / objective(*arguments)[0].detach())
            if not abs(ratio - 1) < 0.02:
                raise RuntimeError(f"compiled, the loss is {ratio} of what it is without")
            log(f"compiled for {name}")
    except Exception as error:
        log(f"training without torch.compile: {error!r}"[:2000])
        return objective
    finally:
        model.zero_grad()
    return compiled


def history(output: Path) -> str:
    """What was done so far, over all runs, in lines for a README."""
    return textwrap.fill((output / DONE).read_text(encoding="utf-8"), 120, break_long_words=False) + "."


def parameter_count(model: nn.Module, largest: int = LARGEST_WEIGHTS_BYTES) -> int:
    """How many there are; the end, where they are more bytes in float16 than a package may carry."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if 2 * parameters > largest:
        sys.exit(f"{parameters} parameters are {2 * parameters} bytes in float16, more than {largest}")
    return parameters


def write_checkpoint(folder: Path, class_name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write weights and configuration as diffusers names and lays them out."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        sys.exit("a weight is not finite in the type in which it is stored")
    weights = folder / WEIGHTS
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    # safetensors writes files that only their owner may read.
    weights.chmod(0o644)
    stated = {"_class_name": class_name, "_diffusers_version": "0.39.0"}
    stated |= {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")


def read_checkpoint(
    folder: Path,
    model: Callable[[VAEConfig], M],
    arch: type[VAEArchConfig],
    names: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> M:
    """What `write_checkpoint` wrote, in float32 on the CPU; `names` makes the model's tensors of the file's."""
    facts = arch.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    made = model(VAEConfig(arch_config=facts))
    made.load_state_dict(names(load_file(folder / WEIGHTS)))
    return made.requires_grad_(False)


# Enough for the last time of saving.
_CLOSING_SECONDS = 10
