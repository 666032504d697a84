"""Predicted against measured memory of published networks on a GPU, and decodes within budgets beside untiled ones.

Run from the repository's root. Weights are random and made on the device; of a network one half is there at a time, so
that what is measured is what a plan predicts. A row that fails says so, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastvideo_vae_autoencoder_kl.config import SDXL
from fastvideo_vae_autoencoder_kl.model import AutoencoderKL
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import VAEError
from fastvideo_vae_core.plan import Direction, Plan
from fastvideo_vae_gamecraft.config import GAMECRAFT
from fastvideo_vae_gamecraft.model import AutoencoderKLHunyuanVideo
from fastvideo_vae_ltx2.config import LTX20_VIDEO, LTX23_VIDEO
from fastvideo_vae_ltx2.model import AutoencoderKLLTX2Video
from fastvideo_vae_oobleck.config import STABLE_AUDIO_OPEN
from fastvideo_vae_oobleck.model import AutoencoderOobleck
from fastvideo_vae_wan.config import WAN21, WAN22
from fastvideo_vae_wan.model import AutoencoderKLWan

START = time.monotonic()
VAE = Any


@dataclass(frozen=True, kw_only=True)
class Network:
    """A published network, the latent grids to measure, a tile of pixels for them, and a type."""

    model: type[VAE]
    arch: Any
    grids: tuple[tuple[int, ...], ...]
    tile: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16


NETWORKS = {
    "autoencoder_kl": Network(
        model=AutoencoderKL,
        arch=SDXL,
        grids=((32, 32), (64, 64), (96, 64), (128, 128), (160, 96), (192, 192), (256, 256)),
        tile=(256, 256),
    ),
    "wan": Network(
        model=AutoencoderKLWan,
        arch=WAN21,
        grids=((1, 60, 104), (3, 12, 20), (3, 30, 52), (5, 60, 104), (9, 30, 52), (3, 90, 160)),
        tile=(256, 256),
    ),
    "wan 2.2": Network(
        model=AutoencoderKLWan, arch=WAN22, grids=((3, 6, 10), (3, 22, 40), (5, 30, 52)), tile=(256, 256)
    ),
    "ltx2": Network(
        model=AutoencoderKLLTX2Video,
        arch=LTX20_VIDEO,
        grids=((1, 16, 24), (3, 8, 12), (7, 16, 24), (16, 8, 12), (16, 16, 24), (4, 34, 60)),
        tile=(256, 256),
    ),
    "ltx2 2.3": Network(
        model=AutoencoderKLLTX2Video, arch=LTX23_VIDEO, grids=((3, 8, 12), (9, 16, 24)), tile=(256, 256)
    ),
    "gamecraft": Network(
        model=AutoencoderKLHunyuanVideo,
        arch=GAMECRAFT,
        grids=((1, 32, 48), (2, 22, 38), (3, 44, 76), (5, 32, 32), (9, 22, 38), (9, 44, 76)),
        tile=(256, 256),
    ),
    "oobleck": Network(
        model=AutoencoderOobleck,
        arch=STABLE_AUDIO_OPEN,
        grids=((64,), (128,), (215,), (430,), (700,), (1024,), (1500,), (3000,)),
        tile=(256 * 2048,),
        dtype=torch.float16,
    ),
}

# The latents of the decodes that have to fit, and into what.
BUDGETS = {
    "wan 81 x 720 x 1280": ("wan", (21, 90, 160), "8GiB"),
    "ltx2 121 x 1088 x 1920": ("ltx2", (16, 34, 60), "6GiB"),
    "gamecraft 33 x 704 x 1216": ("gamecraft", (9, 88, 152), "8GiB"),
    "SDXL 4096 x 4096": ("autoencoder_kl", (512, 512), "4GiB"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="", help="those whose names begin so; by default all")
    parser.add_argument("--seconds", type=float, default=400, help="leave out what no longer fits")
    parser.add_argument("--budgets", action="store_true", help="the decodes within budgets, beside the untiled ones")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="the smallest grids, to see whether the script runs")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print("torch", torch.__version__, "cudnn", torch.backends.cudnn.version())
    with torch.no_grad():
        (budgets if options.budgets else predictions)(options)


def predictions(options: argparse.Namespace) -> None:
    """A row for each plan."""
    print("| network | direction | input | plan | predicted MiB | measured MiB | ratio | ms |")
    print("|---|---|---|---|--:|--:|--:|--:|")
    names = [name for name in NETWORKS if name.startswith(options.family)]
    found: dict[str, list[float]] = {}
    for order, name in enumerate(names):
        # Each has its share of what is left.
        deadline = time.monotonic() + (options.seconds - (time.monotonic() - START)) / (len(names) - order)
        for direction in ("decode", "encode"):
            vae = built(name, direction, options)
            for grid in NETWORKS[name].grids[: 1 if options.small else None]:
                if time.monotonic() > deadline:
                    break
                for label, make in plans(vae, name, direction, grid):
                    row = measured(vae, direction, label, make, options)
                    if row is not None:
                        text, ratio = row
                        print(f"| {name} | {direction} | {text} |", flush=True)
                        found.setdefault(name.split()[0], []).append(ratio)
            del vae
            clean(options)
    for family, ratios in found.items():
        over, under = max(ratios) - 1, 1 - min(ratios)
        print(f"{family}: {len(ratios)} plans, at most {over:.1%} too high and {under:.1%} too low")


def budgets(options: argparse.Namespace) -> None:
    """Each decode as fast as fits, untiled where it does, and within its budget: milliseconds, memory, and how far the
    results are apart. The plan stands behind its row."""
    print("| decode | budget | untiled ms | ms | times | predicted MiB | measured MiB | difference |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for name, (network, grid, budget) in BUDGETS.items():
        if not network.startswith(options.family):
            continue
        if options.small:
            # And within a fifth less memory than the whole takes.
            grid = tuple(max(size // 8, 1) for size in grid)
        vae = built(network, "decode", options)
        z = example(vae, "decode", grid, options)
        # Where the whole does not fit, to try it costs minutes.
        whole = vae.plan_decode(z.shape, memory_budget="free")
        begin = time.monotonic()
        try:
            plan = vae.plan_decode(z.shape, memory_budget=whole.peak_bytes * 4 // 5 if options.small else budget)
        except VAEError as error:
            print(f"{name}: {error}")
            continue
        planning = time.monotonic() - begin
        try:
            reference, slow, _ = timed(vae, "decode", z, whole, options)
            reference = reference.cpu()
        except torch.OutOfMemoryError:
            reference, slow = None, float("nan")
        clean(options)
        made, fast, peak = timed(vae, "decode", z, plan, options)
        gap = float("nan") if reference is None else float((made.cpu().float() - reference.float()).abs().max())
        times = f"{slow:.1f} | {fast:.1f} | {fast / slow:.2f}"
        print(f"| {name} | {budget} | {times} | {mib(plan.peak_bytes)} | {mib(peak)} | {gap:.2e} |")
        against = "" if whole.tile is None else f"; the other in {', '.join(whole.mode_parts())}"
        print(f"\n{name}, planned in {planning:.1f} s{against}\n{plan}\n", flush=True)
        del vae, z, made, reference
        clean(options)


def plans(vae: VAE, name: str, direction: Direction, grid: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Plan]]]:
    """Ways to compute it: whole, in pieces, in tiles, within a budget, and with grids on the host."""
    shape = input_shape(vae, direction, grid)
    make = vae.plan_decode if direction == "decode" else vae.plan_encode
    whole = make(shape)
    yield "whole" if whole.tile is None else "by itself", lambda: whole
    if whole.chunk is not None and whole.chunk > 1:
        yield "chunk 1", lambda: make(shape, chunk=1)
    pixels = vae.decoded_shape(input_shape(vae, "decode", grid))[2:]
    tile = (*pixels[: -len(NETWORKS[name].tile)], *NETWORKS[name].tile)
    if any(length < size for length, size in zip(tile, pixels, strict=True)):
        yield "tiles", lambda: make(shape, tile=tile)
    yield "budget", lambda: make(shape, memory_budget=whole.peak_bytes * 3 // 4)
    steps = len(vae._steps(direction))
    if steps > 1 and len(pixels) > 1:
        slab = (*pixels[:-2], max(pixels[-2] // 4, 32), pixels[-1])
        options = {"places": ("slabs",) * steps, "host_shares": (0.5,) * steps}
        yield "slabs, half on host", lambda: replace(make(shape, tile=slab), **options)


def measured(
    vae: VAE, direction: Direction, label: str, make: Callable[[], Plan], options: argparse.Namespace
) -> tuple[str, float] | None:
    """The cells of a row, and the prediction as a multiple of what was measured."""
    try:
        plan = make()
        x = torch.randn(plan.input_shape, dtype=vae.dtype, device=options.device)
        _, milliseconds, peak = timed(vae, direction, x, plan, options)
    except (VAEError, torch.OutOfMemoryError) as error:
        print(f"{label}: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None
    sizes = " x ".join(map(str, plan.input_shape))
    ratio = plan.peak_bytes / peak if peak else float("nan")
    return f"{sizes} | {label} | {mib(plan.peak_bytes)} | {mib(peak)} | {ratio:.3f} | {milliseconds:.1f}", ratio


def timed(
    vae: VAE, direction: Direction, x: Tensor, plan: Plan, options: argparse.Namespace
) -> tuple[Tensor, float, int]:
    """The result, milliseconds, and the peak of the device's memory, of the last run. Those before it, which compile
    and fill PyTorch's allocators, are not timed."""
    on_gpu = torch.device(options.device).type == "cuda"
    milliseconds, peak = 0.0, 0
    clean(options)
    for last in (False, False, True) if on_gpu else (True,):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        begin = time.perf_counter()
        made = vae._run(direction, x, plan)
        if on_gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        milliseconds = 1e3 * (time.perf_counter() - begin)
        if not last:
            del made
    return made, milliseconds, peak


def built(name: str, direction: Direction, options: argparse.Namespace) -> VAE:
    """One half of a network, with random weights."""
    network = NETWORKS[name]
    config = VAEConfig(
        arch_config=network.arch, load_encoder=direction == "encode", load_decoder=direction == "decode", fp16="off"
    )
    with torch.device(options.device):
        vae = network.model(config)
    dtype = torch.float32 if torch.device(options.device).type == "cpu" else network.dtype
    return vae.to(dtype).eval().requires_grad_(False)


def input_shape(vae: VAE, direction: Direction, grid: tuple[int, ...]) -> tuple[int, ...]:
    """Of latents of that grid, or of the samples that they stand for."""
    z_shape = (1, vae.channels[1], *grid)
    return z_shape if direction == "decode" else tuple(vae.decoded_shape(z_shape))


def example(vae: VAE, direction: Direction, grid: tuple[int, ...], options: argparse.Namespace) -> Tensor:
    generator = torch.Generator(options.device).manual_seed(0)
    shape = input_shape(vae, direction, grid)
    return torch.randn(shape, dtype=vae.dtype, device=options.device, generator=generator)


def clean(options: argparse.Namespace) -> None:
    gc.collect()
    if torch.device(options.device).type == "cuda":
        torch.cuda.empty_cache()


def mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


if __name__ == "__main__":
    main()
