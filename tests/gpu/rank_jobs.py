"""What `test_nccl` has ranks do, each a process: JOB WORLD FOLDER RANK DEVICE, with an answer in FOLDER/RANK.json."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastvideo_vae_autoencoder_kl import AutoencoderKL
from fastvideo_vae_autoencoder_kl.config import SDXL
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import ShardError
from fastvideo_vae_core.sharding import Sharding
from fastvideo_vae_core.testing.golden import fill
from fastvideo_vae_gamecraft import AutoencoderKLHunyuanVideo
from fastvideo_vae_gamecraft.config import GAMECRAFT
from fastvideo_vae_ltx2 import AutoencoderKLLTX2Video
from fastvideo_vae_ltx2.config import LTX20_VIDEO
from fastvideo_vae_oobleck import AutoencoderOobleck
from fastvideo_vae_oobleck.config import STABLE_AUDIO_OPEN
from fastvideo_vae_wan import AutoencoderKLWan
from fastvideo_vae_wan.config import WAN21, WAN22

# Narrow networks, and latents behind (B, C), uneven between two ranks.
SMALL: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "autoencoder_kl": (AutoencoderKL, replace(SDXL, block_out_channels=(32,) * 4), (9, 5)),
    "gamecraft": (AutoencoderKLHunyuanVideo, replace(GAMECRAFT, block_out_channels=(32,) * 4), (2, 5, 3)),
    "ltx2": (
        AutoencoderKLLTX2Video,
        replace(LTX20_VIDEO, block_out_channels=(8, 16, 32, 32), decoder_block_out_channels=(8, 16, 32)),
        (3, 5, 4),
    ),
    "oobleck": (
        AutoencoderOobleck,
        replace(STABLE_AUDIO_OPEN, encoder_hidden_size=8, decoder_input_channels=4, decoder_channels=8),
        (33,),
    ),
    "wan2.1": (AutoencoderKLWan, replace(WAN21, base_dim=8, num_res_blocks=1), (3, 5, 3)),
    "wan2.2": (AutoencoderKLWan, replace(WAN22, base_dim=8, decoder_base_dim=8, num_res_blocks=1), (3, 5, 3)),
}


def model(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """A network with random weights, and latents for it."""
    build, arch, grid = SMALL[name]
    vae = build(VAEConfig(arch_config=arch)).eval().requires_grad_(False)
    fill(vae)
    vae = vae.to(device, dtype)
    z = torch.randn(1, vae.channels[1], *grid, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return vae, z.to(device)


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
    sharding = Sharding(group=dist.group.WORLD, timeout=60)
    for name in SMALL:
        vae, z = model(name, device, torch.float64)
        x = vae.decode(z).sample
        made = vae.decode(z, plan=vae.plan_decode(tuple(z.shape), mesh=sharding)).sample
        again = vae.encode(x, plan=vae.plan_encode(tuple(x.shape), mesh=sharding)).latent_dist.mode()
        if sharding.rank == 0:
            found[f"{name} decode"] = float((made - x).abs().max() / x.abs().max())
            mode = vae.encode(x).latent_dist.mode()
            found[f"{name} encode"] = float((again - mode).abs().max() / mode.abs().max())
    return found


def lost(job: str, device: torch.device, rank: int) -> dict[str, Any]:
    """How long a rank that goes on waits for one that does not, and what it says."""
    vae, z = model("wan2.1", device, torch.float32)
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
