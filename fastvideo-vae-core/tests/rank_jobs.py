"""What `test_sharding` has ranks do, each a process: JOB WORLD FOLDER RANK, with an answer in FOLDER/RANK.pt."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from fastvideo_vae_core.errors import ShardError
from fastvideo_vae_core.sharding import Sharding
from fastvideo_vae_core.testing.toys import Toy, ToyImage, toy

LATENTS = (1, 4, 9, 5)


def main(job: str, world: int, folder: Path, rank: int) -> None:
    torch.set_grad_enabled(False)
    store = dist.FileStore(str(folder / "store"), world)
    # As long as groups wait by default: it is the call's own timeout that counts.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=30))
    vae = toy(ToyImage).double().requires_grad_(False)
    z = torch.randn(LATENTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.save(JOBS[job](vae, z, rank, world), folder / f"{rank}.pt")


def two_groups(vae: Toy, z: torch.Tensor, rank: int, world: int) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (world,))
    made = {"mesh": vae.decode(z, plan=vae.plan_decode(LATENTS, mesh=mesh)).sample}
    groups = {pair: dist.new_group(list(pair)) for pair in combinations(range(world), 2)}
    # Both plans before the first call.
    plans = {
        f"{one}{other}": vae.plan_decode(LATENTS, mesh=Sharding(group=group, destination=None, timeout=20))
        for (one, other), group in groups.items()
        if rank in (one, other)
    }
    return made | {name: vae.decode(z, plan=plan).sample for name, plan in plans.items()}


def killed(vae: Toy, z: torch.Tensor, rank: int, world: int) -> dict[str, Any]:
    return lost(vae, z, rank, signal.SIGKILL)


def stopped(vae: Toy, z: torch.Tensor, rank: int, world: int) -> dict[str, Any]:
    return lost(vae, z, rank, signal.SIGSTOP)


def lost(vae: Toy, z: torch.Tensor, rank: int, how: signal.Signals) -> dict[str, Any]:
    plan = vae.plan_decode(LATENTS, mesh=Sharding(group=dist.group.WORLD, axis=0, timeout=10))
    vae.decode(z, plan=plan)
    if rank == 1:
        last = [module for module in vae.decoder.modules() if isinstance(module, nn.Conv2d)][-1]
        last.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), how))
    started = time.monotonic()
    try:
        vae.decode(z, plan=plan)
    except ShardError as error:
        return {"seconds": time.monotonic() - started, "error": f"ShardError: {error}"}
    return {"seconds": 0.0, "error": "none"}


JOBS = {job.__name__: job for job in (two_groups, killed, stopped)}

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
