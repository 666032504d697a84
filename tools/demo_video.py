"""What the trainings of miniatures of video share: crops of clips, the objective, the steps, measuring and the README.

Free video in packages is little, so a camera also moves over photographs; see demo_clips.py and demo_photographs.py.

Shape legend: B batch, C channels; T frames, H, W pixels; P pixels of all frames in a row.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import demo_clips
import demo_photographs
from demo_card import Card, credit_of, read_sources, source_table, source_tables, table
from demo_clips import SHIPPED
from demo_training import (
    LEARNS_PICTURES,
    WEIGHTS,
    Dice,
    Log,
    Objective,
    Optimisation,
    Progress,
    Run,
    Trainer,
    Way,
    add_steps,
    command_line,
    compiled_or_plain,
    history,
    picture_loss,
    read_checkpoint,
    told_of,
    write_checkpoint,
)
from fastvideo_vae_core.config import VAEArchConfig, VAEConfig
from fastvideo_vae_core.distribution import DiagonalGaussianDistribution
from fastvideo_vae_core.media.images import from_uint8
from fastvideo_vae_core.vae import ParallelTiledVAE

Array = np.ndarray[Any, np.dtype[np.uint8]]
Model = ParallelTiledVAE[DiagonalGaussianDistribution]
Arch = TypeVar("Arch", bound=VAEArchConfig)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training, until a share of the time has passed.

    Attributes:
        frames, side, batch: of the crops.
        l1, gradient: weights, beside the squared error, of the absolute errors of pixels and of their differences in
            space.
    """

    until: float
    frames: int
    side: int
    batch: int
    l1: float = 0.0
    gradient: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Recipe(Optimisation, Generic[Arch]):
    """What a miniature is and how it learns.

    Attributes:
        stages: in the last only the squared error counts, because PSNR measures that, and crops are as long as the clip
            that ships: a causal network drifts behind the frames that it was trained on. Crops of one size are compiled
            once, which takes a minute or two.
        clip_scales, photograph_scales: pictures are shrunk to these; each crop comes from one of them.
        photographs: share of the crops in which a camera moves over a photograph.
        shaken: share of the crops of clips in which the crop moves.
        speed: of the camera, at most, in pixels per frame.
        jitter: share of the crops whose colours are changed.
        kl: weight of the Kullback-Leibler divergence per latent value.
    """

    arch: Arch
    seed: int = 0
    stages: tuple[Stage, ...] = (
        Stage(until=0.6, frames=9, side=128, batch=4, l1=0.05, gradient=0.05),
        Stage(until=1.0, frames=33, side=96, batch=2),
    )
    clip_scales: tuple[float, ...] = (1.0, 0.71)
    photograph_scales: tuple[float, ...] = (0.71, 0.5, 0.35, 0.25)
    photographs: float = 0.5
    shaken: float = 0.3
    speed: float = 4.0
    jitter: float = 0.3
    kl: float = 1e-5
    learning_rate: float = 2e-3


# More of the same for weights that are trained already: one shape is compiled.
POLISH_STAGES = (Stage(until=1.0, frames=33, side=96, batch=2),)
# What a CPU can rehearse in a minute.
SMALL_STAGES = (
    Stage(until=0.8, frames=5, side=64, batch=2, l1=0.05, gradient=0.05),
    Stage(until=1.0, frames=5, side=64, batch=2),
)


def encode(model: Model, x_BCTHW: Tensor) -> Tensor:
    """The parameters of the posterior, as the model itself computes them."""
    return model.encode(x_BCTHW).latent_dist.parameters


def decode(model: Model, z_BCthw: Tensor) -> Tensor:
    return model.decode(z_BCthw).sample


def configuration(arch: VAEArchConfig) -> dict[str, Any]:
    return arch.to_dict()


@dataclass(frozen=True, kw_only=True)
class Miniature(Generic[Arch]):
    """A family's miniature of video.

    Attributes:
        script: the file in `tools`; `class_name`: of its configuration, as diffusers has it.
        initialised: a model that is about to be trained.
        with_statistics: architecture and state of a model with these means and deviations of its latents.
        describe: the sentence of the README that says what it is.
        configuration: what of an architecture is written.
        encode, decode: the two halves, to be differentiated and compiled.
    """

    script: str
    class_name: str
    model: Callable[[VAEConfig], Model]
    arch: type[Arch]
    recipes: Mapping[str, Recipe[Arch]]
    initialised: Callable[[Arch], Model]
    with_statistics: Callable[[Arch, dict[str, Tensor], Tensor, Tensor], tuple[Arch, dict[str, Tensor]]]
    describe: Callable[[Arch], str]
    configuration: Callable[[Arch], dict[str, Any]] = configuration
    encode: Callable[[Any, Tensor], Tensor] = encode
    decode: Callable[[Any, Tensor], Tensor] = decode

    def load(self, folder: Path) -> Model:
        """What was written, in float32 on the CPU."""
        return read_checkpoint(folder, self.model, self.arch)

    def save(self, model: Model, arch: Arch, statistics: tuple[Tensor, Tensor], folder: Path) -> None:
        """Write the weights in float16, and the configuration."""
        arch, state = self.with_statistics(arch, model.state_dict(), *statistics)
        tensors = {name: tensor.half() for name, tensor in state.items()}
        write_checkpoint(folder, self.class_name, tensors, self.configuration(arch))


DATA = {"clips": "what demo_clips.py wrote", "photographs": "what demo_photographs.py wrote"}


def main(miniature: Miniature[Any], doc: str | None, arguments: Sequence[str] | None = None) -> None:
    """The command line of a script that trains nothing else."""
    parser, steps = command_line(doc)
    add_video_steps(steps, miniature)
    perform(miniature, parser.parse_args(arguments))


def add_video_steps(steps: Any, miniature: Miniature[Any]) -> None:
    add_steps(steps, DATA, recipes=tuple(miniature.recipes), minutes=8.0, reserve=60.0)


def perform(miniature: Miniature[Any], options: argparse.Namespace) -> None:
    """The step `train` or `measure` of a command line."""
    if options.step == "train":
        train(miniature, miniature.recipes[options.recipe], options.clips, options.photographs, Way.of(options))
    else:
        measure(miniature, options.clips, options.photographs, options.output, options.device)


# ---------------------------------------------------------------- train


def train(miniature: Miniature[Arch], recipe: Recipe[Arch], clips: Path, photographs: Path, way: Way) -> None:
    """Train until the time is nearly over, saving what ships now and then."""
    torch.manual_seed(recipe.seed)
    batches = ", then ".join(f"{s.batch} crops of {s.frames} frames of {s.side}² pixels" for s in recipe.stages)

    def write(averaged: Model, folder: Path, _: bool) -> None:
        miniature.save(averaged, recipe.arch, statistics(miniature, averaged, material, recipe.stages[-1]), folder)

    run = Run[Model](way, recipe, write, lambda steps: f"{steps} steps of {batches}")
    model = run.begin(miniature.initialised(recipe.arch), miniature.load)
    material = Material(
        list(demo_clips.training(clips)), list(demo_photographs.training(photographs)), recipe, way.device
    )
    run.log(f"{len(material.starts)} clips and photographs of {len(material.pixels_PC) / 1e6:.1f} million pixels")
    fit(miniature, model, material, recipe, run)
    if way.measured:
        measure(miniature, clips, photographs, way.output, way.device)


def fit(miniature: Miniature[Arch], model: Model, material: Material, recipe: Recipe[Arch], run: Run[Model]) -> None:
    """Train until the deadline."""
    kl = torch.tensor(recipe.kl, device=model.device)
    weights = [torch.tensor([stage.l1, stage.gradient], device=model.device) for stage in recipe.stages]
    plain = objective_of(miniature)
    compute = plain
    if run.way.compiled:
        shapes = {(s.frames, s.side, s.batch): (s, weight) for s, weight in zip(recipe.stages, weights, strict=True)}
        examples = {
            f"{stage.frames} frames of {stage.side}²": (model, material.draw(stage), weight, kl)
            for stage, weight in shapes.values()
        }
        compute = compiled_or_plain(plain, examples, model, run.log)
    trainer = Trainer(model, run)
    for stage, weight in zip(recipe.stages, weights, strict=True):
        told = told_of(stage.batch * stage.frames * stage.side**2)
        progress = Progress(told, run.log, every=100 if model.device.type == "cuda" else 10)
        while trainer.passed < stage.until:
            loss, squared = compute(model, material.draw(stage), weight, kl)
            trainer.step(loss)
            progress(squared, trainer)
    trainer.finish()


def objective_of(miniature: Miniature[Any]) -> Objective:
    def objective(model: Model, x_BCTHW: Tensor, weights: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the mean squared error in it; `weights` are those of the absolute errors."""
        with torch.autocast(x_BCTHW.device.type, torch.bfloat16, enabled=x_BCTHW.is_cuda):
            posterior = DiagonalGaussianDistribution(miniature.encode(model, x_BCTHW).float())
            y_BCTHW = miniature.decode(model, posterior.sample()).float()
        return picture_loss(y_BCTHW, x_BCTHW, posterior, weights, kl)

    return objective


def statistics(miniature: Miniature[Any], model: Model, material: Material, stage: Stage) -> tuple[Tensor, Tensor]:
    """Means and deviations of each channel of the latents of training crops, on the CPU."""
    with torch.inference_mode():
        z = torch.cat([miniature.encode(model, material.draw(stage)).chunk(2, dim=1)[0] for _ in range(_STATISTICS)])
    std, mean = torch.std_mean(z.double().cpu(), dim=(0, 2, 3, 4))
    return mean, std


# ---------------------------------------------------------------- material


class Material:
    """All clips and photographs in all scales, which lie in the device's memory as one row of 8-bit pixels.

    A photograph is a clip of one frame.
    """

    def __init__(self, clips: Sequence[Array], photographs: Sequence[Array], recipe: Recipe[Any], device: str) -> None:
        side = max(stage.side for stage in recipe.stages)
        levels = [level for clip in clips for level in _shrunk(clip, recipe.clip_scales, side)]
        still = [level for each in photographs for level in _shrunk(each[None], recipe.photograph_scales, side)]
        shares = torch.tensor([1 - recipe.photographs] * len(levels) + [recipe.photographs] * len(still))
        shares[: len(levels)] /= len(levels)
        shares[len(levels) :] /= len(still)
        sizes = torch.tensor([level.shape[:3] for level in (*levels, *still)])
        self.recipe = recipe
        self.frames, self.heights, self.widths = sizes.to(device).unbind(1)
        self.starts = (sizes.prod(1).cumsum(0) - sizes.prod(1)).to(device)
        # The square root of the size stands between every picture and every pixel counting alike.
        roots = sizes.prod(1).double().sqrt()
        for part in (slice(0, len(levels)), slice(len(levels), None)):
            shares[part] = shares[part].sum() * (roots[part] / roots[part].sum()).float()
        self.chances = shares.to(device)
        flat = [torch.from_numpy(level.reshape(-1, 3).copy()) for level in (*levels, *still)]
        self.pixels_PC = torch.cat(flat).to(device)
        self.dice = Dice(recipe.seed, device)

    def draw(self, stage: Stage) -> Tensor:
        """(B, 3, T, side, side) in [-1, 1]: cut along a path, mirrored, turned, and some of them recoloured."""
        batch, recipe = stage.batch, self.recipe
        chosen = self.dice.choose(self.chances, batch)
        times_BT = self._times(chosen, stage.frames)
        # A photograph always moves, but for some that stand still and are read without any blur.
        moves = self.dice.coins(batch, recipe.shaken) | ((self.frames[chosen] == 1) & self.dice.coins(batch, 0.8))
        zoom = torch.where(moves, self.dice.uniform(batch, -0.015, 0.015), 0.0)
        steps = torch.arange(stage.frames, device=zoom.device)
        scale_BT = 1 + zoom[:, None] * (steps - stage.frames // 2)
        rows_BTH = self._path(self.heights[chosen], scale_BT, stage.side, moves)
        columns_BTW = self._path(self.widths[chosen], scale_BT, stage.side, moves)
        x_BTHWC = self._sample(chosen, times_BT, rows_BTH, columns_BTW)
        x_BTHWC = torch.where(self.dice.coins(batch, 0.5)[:, None, None, None, None], x_BTHWC.transpose(2, 3), x_BTHWC)
        x_BCTHW = x_BTHWC.permute(0, 4, 1, 2, 3)
        recoloured = self.dice.coins(batch, recipe.jitter)[:, None, None, None, None]
        return torch.where(recoloured, self.dice.recoloured(x_BCTHW), x_BCTHW).contiguous()

    def _times(self, chosen: Tensor, frames: int) -> Tensor:
        """A run of frames, forwards or backwards, some at twice the speed; of a photograph the only one."""
        batch, available = len(chosen), self.frames[chosen]
        every = torch.where((available >= 2 * frames) & self.dice.coins(batch, 0.2), 2, 1)
        span = every * (frames - 1)
        first = (self.dice.uniform(batch, 0, 1) * (available - span).clamp(min=1)).long()
        steps = torch.arange(frames, device=chosen.device)
        steps = torch.where(self.dice.coins(batch, 0.5)[:, None], steps, steps.flip(0))
        return torch.minimum(first[:, None] + every[:, None] * steps, available[:, None] - 1)

    def _path(self, sizes: Tensor, scale_BT: Tensor, side: int, moves: Tensor) -> Tensor:
        """Positions (B, T, side) along one axis, forwards or backwards; the crop stops at the border."""
        batch, frames = scale_BT.shape
        reach_BT = scale_BT * (side - 1) / 2
        room_BT = (sizes[:, None] - 1 - 2 * reach_BT).clamp(min=0)
        begin = (self.dice.uniform(batch, 0, 1) * (room_BT[:, 0] + 1)).floor()
        speed = torch.where(moves, self.dice.uniform(batch, -1, 1).pow(3) * self.recipe.speed, 0.0)
        steps = torch.arange(frames, device=sizes.device)
        offset_BT = torch.minimum((begin[:, None] + speed[:, None] * steps).clamp(min=0), room_BT)
        across = torch.arange(side, device=sizes.device)
        across = torch.where(self.dice.coins(batch, 0.5)[:, None], across, across.flip(0))
        return offset_BT[:, :, None] + scale_BT[:, :, None] * across[:, None, :]

    def _sample(self, chosen: Tensor, times_BT: Tensor, rows_BTH: Tensor, columns_BTW: Tensor) -> Tensor:
        """(B, T, H, W, 3), bilinearly."""
        heights, widths = self.heights[chosen, None, None], self.widths[chosen, None, None]
        base_BT11 = (self.starts[chosen, None] + times_BT * heights[:, :, 0] * widths[:, :, 0])[:, :, None, None]
        top, left = rows_BTH.floor(), columns_BTW.floor()
        down, right = (rows_BTH - top)[..., None, None], (columns_BTW - left)[:, :, None, :, None]
        lines = [(torch.minimum(top.long() + i, heights - 1) * widths)[..., None] for i in (0, 1)]
        places = [torch.minimum(left.long() + i, widths - 1)[:, :, None, :] for i in (0, 1)]

        def mixed(line: Tensor) -> Tensor:
            pair = [from_uint8(self.pixels_PC[base_BT11 + line + place]) for place in places]
            return pair[0].lerp(pair[1], right)

        return mixed(lines[0]).lerp(mixed(lines[1]), down)


def _shrunk(clip_THWC: Array, scales: Sequence[float], side: int) -> Iterator[Array]:
    """A clip in each scale in which a crop still fits; a small one enlarged until one does."""
    height, width = clip_THWC.shape[1:3]
    least = (side + 4) / min(height, width)
    for scale in sorted({max(scale, least) for scale in scales}):
        size = round(width * scale), round(height * scale)
        yield np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.LANCZOS)) for f in clip_THWC])


# ---------------------------------------------------------------- initialisation


def orthogonal(conv: nn.Module, taps: Sequence[tuple[int, ...]]) -> None:
    """All taps zero but those given, which together are an orthogonal matrix; no bias."""
    assert isinstance(conv, nn.Conv2d | nn.Conv3d)
    assert conv.bias is not None
    matrix = nn.init.orthogonal_(torch.empty(conv.out_channels, conv.in_channels * len(taps)))
    conv.weight.zero_()
    conv.bias.zero_()
    for tap, part in zip(taps, matrix.chunk(len(taps), dim=1), strict=True):
        place: tuple[slice | int, ...] = (slice(None), slice(None), *tap)
        conv.weight[place] = part


# ---------------------------------------------------------------- measure


def measure(miniature: Miniature[Any], clips: Path, photographs: Path, output: Path, device: str) -> None:
    """Complete the demo folder of a run from what its files themselves give back."""
    log = Log(output / "log.txt")
    stored = miniature.load(output / "demo").to(device)
    measured = []
    for each in demo_clips.measure(lambda x: through(stored, x), clips, output / "held-out.png"):
        measured.append(each)
        log(f"{each.name}: {each.psnr:.2f} dB, SSIM {each.ssim:.4f}")
    rows = [(m.name, f"{m.frames} × {m.width} × {m.height}", f"{m.psnr:.2f}", f"{m.ssim:.4f}") for m in measured]
    found = table(("clip", "frames × width × height", "PSNR, dB", "SSIM"), rows)
    log(f"{found}\nlowest {min(m.psnr for m in measured):.2f} dB")
    shutil.copyfile(clips / "clip.mp4", output / "demo" / "clip.mp4")
    card(miniature, stored.config.arch_config, found, read_sources(clips), read_sources(photographs)).write(
        output / "demo", history(output)
    )
    log("done")


def through(model: Model, x_BCTHW: Tensor) -> Tensor:
    """A clip through the mode of the posterior, in float32."""
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        return model.decode(model.encode(x_BCTHW.to(model.device)).latent_dist.mode()).sample


def card(
    miniature: Miniature[Any],
    arch: VAEArchConfig,
    measured: str,
    clips: Sequence[Mapping[str, Any]],
    photographs: Sequence[Mapping[str, Any]],
) -> Card:
    """The README of the demo folder."""
    described = (
        f"`{WEIGHTS}` and `config.json` are a small but really trained `{miniature.class_name}` in diffusers' layout:"
        f" {miniature.describe(arch)}, stored in float16. It is there for demonstrations and tests. Its quality is that"
        " of a miniature; for work, load a published checkpoint."
    )
    return Card(
        class_name=miniature.class_name,
        described=textwrap.fill(described, 120),
        compared=COMPARED,
        table=measured,
        script=miniature.script,
        learns=LEARNS_PICTURES,
        example="clip.mp4",
        shipped=f"{credit_of(SHIPPED, clips)}\n{CUT}",
        kind="Clips",
        sources=f"{TRAINED}\n\n{source_tables(clips)}\n\nPhotographs:\n\n{source_table(photographs)}",
    )


COMPARED = """\
Clips that it was not trained on, sent whole through the mode of the posterior in float32, compared in 8-bit levels:"""
CUT = f'It is the held-out clip "{SHIPPED}" of the table: a cut of the film, made smaller.'
TRAINED = """\
These were trained on, and so were movements of a camera over the photographs below. None of them is part of this
package, but for clip.mp4, which was held out:"""

# Batches of crops that the statistics of the latents are taken from.
_STATISTICS = 16
