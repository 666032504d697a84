"""What `test_nccl` has ranks do, each a process: JOB WORLD FOLDER RANK DEVICE, with an answer in FOLDER/RANK.json."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fastvideo_vae_core as fvae
from fastvideo_vae_core.errors import ShardError
from fastvideo_vae_core.sharding import Sharding

# Latents behind (B, C), uneven between two.
LATENTS = {
    "autoencoder_kl": (9, 5),
    "gamecraft": (2, 5, 3),
    "ltx2": (3, 5, 4),
    "oobleck": (33,),
    "wan": (3, 5, 3),
}


def main(job: str, world: int, folder: Path, rank: int, kind: str) -> None:
    torch.set_grad_enabled(False)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(str(folder / "store"), world)
    backend = "nccl" if kind == "cuda" else "gloo"
    # As long as groups wait by default: it is the call's own timeout that counts.
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=30))
    answer = same(device) if job == "same" else lost(job, device, rank)
    (folder / f"{rank}.json").write_text(json.dumps(answer))
    # A group that is broken cannot be taken down in good order.
    os._exit(0)


def same(device: torch.device) -> dict[str, float]:
    """Of every family the largest difference between one device and all, in both directions."""
    found: dict[str, float] = {}
    for family, grid in LATENTS.items():
        vae = fvae.load_demo(family, device=device).double()
        vae.config = type(vae.config)(**{**vars(vae.config), "fp16": "off"})
        sharding = Sharding(group=dist.group.WORLD, timeout=60)
        z = torch.randn(1, vae.channels[1], *grid, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        z = z.to(device)
        x = vae.decode(z).sample
        made = vae.decode(z, plan=vae.plan_decode(tuple(z.shape), mesh=sharding)).sample
        again = vae.encode(x, plan=vae.plan_encode(tuple(x.shape), mesh=sharding)).latent_dist.mode()
        if sharding.rank == 0:
            found[f"{family} decode"] = float((made - x).abs().max() / x.abs().max())
            mode = vae.encode(x).latent_dist.mode()
            found[f"{family} encode"] = float((again - mode).abs().max() / mode.abs().max())
    return found


def lost(job: str, device: torch.device, rank: int) -> dict[str, Any]:
    """How long a rank that goes on waits for one that does not, and what it says."""
    vae = fvae.load_demo("wan", device=device).float()
    z = torch.randn(1, vae.channels[1], *LATENTS["wan"]).to(device)
    plan = vae.plan_decode(tuple(z.shape), mesh=Sharding(group=dist.group.WORLD, timeout=10))
    vae.decode(z, plan=plan)
    if rank == 1:
        layer = [module for module in vae.decoder.modules() if isinstance(module, nn.Conv2d)][-1]
        layer.register_forward_pre_hook(lambda *_: FATES[job]())
    started = time.monotonic()
    try:
        vae.decode(z, plan=plan).sample.cpu()
    except (ShardError, ArithmeticError) as error:
        return {"seconds": time.monotonic() - started, "error": f"{type(error).__name__}: {error}"}
    return {"seconds": 0.0, "error": "none"}


def fail() -> None:
    raise ArithmeticError("out of luck")


FATES = {
    "raises": fail,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
