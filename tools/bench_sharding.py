"""Decoding on several GPUs beside one: time, difference and what is exchanged, as a table in Markdown.

    torchrun --nproc-per-node=2 tools/bench_sharding.py

Published configurations, random weights, bfloat16. Where DistVAE and diffusers are installed, they decode the same in
the same run. `--tiny` is a rehearsal over Gloo on the CPU, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastvideo_vae_autoencoder_kl import AutoencoderKL
from fastvideo_vae_autoencoder_kl.config import SDXL
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.lines import Line
from fastvideo_vae_core.sharding import Sharding
from fastvideo_vae_core.testing.golden import fill
from fastvideo_vae_gamecraft import AutoencoderKLHunyuanVideo
from fastvideo_vae_gamecraft.config import GAMECRAFT
from fastvideo_vae_ltx2 import AutoencoderKLLTX2Video
from fastvideo_vae_ltx2.config import LTX20_VIDEO
from fastvideo_vae_wan import AutoencoderKLWan
from fastvideo_vae_wan.config import WAN21


@dataclass(frozen=True)
class Case:
    """What is decoded: a network, and a grid of latents."""

    name: str
    build: Callable[..., Any]
    arch: Any
    latents: tuple[int, ...]
    tiny: dict[str, Any]
    small: tuple[int, ...]


CASES = [
    Case("Wan 2.1, 81 x 720 x 1280", AutoencoderKLWan, WAN21, (16, 21, 90, 160), {"base_dim": 8}, (16, 3, 6, 5)),
    Case(
        "GameCraft, 33 x 704 x 1216",
        AutoencoderKLHunyuanVideo,
        GAMECRAFT,
        (16, 9, 88, 152),
        {"block_out_channels": (32,) * 4},
        (16, 2, 6, 5),
    ),
    Case("SDXL, 2048 x 2048", AutoencoderKL, SDXL, (4, 256, 256), {"block_out_channels": (32,) * 4}, (4, 12, 9)),
    Case(
        "LTX-2, 121 x 1088 x 1920",
        AutoencoderKLLTX2Video,
        LTX20_VIDEO,
        (128, 16, 34, 60),
        {"decoder_block_out_channels": (16, 32, 64), "block_out_channels": (16, 32, 64, 64)},
        (128, 3, 5, 4),
    ),
]


@dataclass
class Traffic:
    """What one rank exchanges during a call."""

    count: int = 0
    received: int = 0
    marks: list[tuple[Any, Any]] | None = None

    @contextmanager
    def counted(self) -> Iterator[None]:
        exchange = Line.exchange

        def noted(line: Line, operations: list[dist.P2POp]) -> None:
            self.count += 1
            inward = [each.tensor for each in operations if each.op is dist.irecv]
            self.received += sum(each.numel() * each.element_size() for each in inward)
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if torch.cuda.is_available() else []
            for event in pair[:1]:
                event.record()
            exchange(line, operations)
            for event in pair[1:]:
                event.record()
            if pair:
                self.marks = [*(self.marks or []), (pair[0], pair[1])]

        Line.exchange = noted  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Line.exchange = exchange  # type: ignore[method-assign]

    @property
    def milliseconds(self) -> float | None:
        """In exchanges, waiting for the others included."""
        if self.marks is None:
            return None
        torch.cuda.synchronize()
        return sum(first.elapsed_time(last) for first, last in self.marks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="", help="a part of the names of what is to be decoded")
    options = parser.parse_args()
    dist.init_process_group("gloo" if options.tiny else "nccl", timeout=timedelta(minutes=10))
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu") if options.tiny else torch.device("cuda", rank % torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_grad_enabled(False)
    say(f"{world} x {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}\n")
    say("| decode | one ms | all ms | speed-up | GiB, one and all | difference | exchanges | received MiB | their ms |")
    say("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for case in CASES:
        if options.only.lower() in case.name.lower():
            measure(case, device, options.tiny, options.runs)
    dist.destroy_process_group()


def measure(case: Case, device: torch.device, tiny: bool, runs: int) -> None:
    """One row, and one more for DistVAE where it can run."""
    model = built(case, device, tiny)
    sizes = (1, *(case.small if tiny else case.latents))
    z = torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(device, model.dtype)
    sharding = Sharding(group=dist.group.WORLD, timeout=300)
    plan = model.plan_decode(tuple(z.shape), mesh=sharding)
    first = dist.get_rank() == 0
    whole, one, peak = timed(lambda: model.decode(z).sample, runs, device) if first else (None, 0.0, 0.0)
    dist.barrier()
    made, all_, shared_peak = timed(lambda: model.decode(z, plan=plan).sample, runs, device)
    traffic = Traffic()
    with traffic.counted():
        model.decode(z, plan=plan)
    if first:
        spent = traffic.milliseconds
        cells = [
            case.name,
            f"{one:.1f}",
            f"{all_:.1f}",
            f"{one / all_:.2f}x",
            f"{peak:.1f}, {shared_peak:.1f}",
            f"{difference(made, whole):.1e}",
            str(traffic.count),
            f"{traffic.received / 2**20:.1f}",
            "" if spent is None else f"{spent:.1f}",
        ]
        say(f"| {' | '.join(cells)} |")
    del made, whole
    beside_distvae(model, z, runs, device)


def built(case: Case, device: torch.device, tiny: bool) -> Any:
    arch = replace(case.arch, **case.tiny) if tiny else case.arch
    with torch.device("cpu" if tiny else device):
        model = case.build(VAEConfig(arch_config=arch, load_encoder=False))
    fill(model)
    return model.to(device, torch.float32 if tiny else torch.bfloat16).eval().requires_grad_(False)


def beside_distvae(model: Any, z: Tensor, runs: int, device: torch.device) -> None:
    """diffusers' decoder on one device and under DistVAE, with the same weights."""
    try:
        diffusers: Any = importlib.import_module("diffusers")
        distvae: Any = importlib.import_module("distvae.vae")
    except ImportError as error:
        say(f"\nDistVAE was not measured: {error}.\n")
        return
    diffusers.logging.set_verbosity_error()
    kind = getattr(diffusers, type(model).__name__)
    known = inspect.signature(kind.__init__).parameters
    arch = model.config.arch_config.to_dict()
    theirs = kind(**{name: each for name, each in arch.items() if name in known})
    theirs.use_framewise_decoding = False
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs = theirs.to(device, model.dtype).eval()
    first = dist.get_rank() == 0
    whole, one, peak = timed(lambda: theirs.decode(z).sample, runs, device) if first else (None, 0.0, 0.0)
    dist.barrier()
    try:
        distvae.parallelize_decoder(theirs, dist.group.WORLD)
        made, all_, shared_peak = timed(lambda: theirs.decode(z).sample, runs, device)
    except Exception as error:
        say(f"| diffusers, and DistVAE refuses: {error} | {one:.1f} | | | {peak:.1f} | | | | |")
        return
    if first:
        cells = [f"{one:.1f}", f"{all_:.1f}", f"{one / all_:.2f}x", f"{peak:.1f}, {shared_peak:.1f}"]
        say(f"| diffusers and DistVAE | {' | '.join(cells)} | {difference(made, whole):.1e} | | | |")


def timed(call: Callable[[], Tensor], runs: int, device: torch.device) -> tuple[Tensor, float, float]:
    """A result, the median of the milliseconds behind one run to warm up, and the peak of memory in GiB."""
    made = call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(runs):
        synchronize(device)
        began = time.perf_counter()
        made = call()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - began))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return made, statistics.median(times), peak


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def difference(made: Tensor, whole: Tensor | None) -> float:
    """The largest, relative to the largest number."""
    assert whole is not None
    return float((made.float() - whole.float()).abs().max() / whole.float().abs().max())


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
