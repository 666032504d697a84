"""The path of GPUs through the whole network, in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import importlib.util

import pytest

from fastvideo_vae_core.testing.interpreter import interpreted

_SCRIPT = """
import json, torch
from fastvideo_vae_autoencoder_kl import AutoencoderKL, AutoencoderKLArchConfig
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.ops import norm
from fastvideo_vae_core.testing.golden import fill

torch.set_num_threads(1)
arch = AutoencoderKLArchConfig(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(8, 16),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
)
model = AutoencoderKL(VAEConfig(arch_config=arch))
fill(model, gains={"decoder.conv_out.weight": 0.5}).requires_grad_(False)
z = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(0))
x = model.decode(z).sample
exact = model.encode(x).latent_dist.parameters

taken = []
def on_gpu(x):
    fits = x.ndim == 4 and x.stride(1) == 1
    taken.append(fits)
    return fits
norm._on_gpu = on_gpu
model = model.to(memory_format=torch.channels_last)
last = lambda x: x.contiguous(memory_format=torch.channels_last)
errors = {}
for tile in (None, (6, 8)):
    made = model.decode(last(z), plan=model.plan_decode(z.shape, tile=tile)).sample
    errors[f"decode {tile}"] = float((made - x).norm() / x.norm())
    made = model.encode(last(x), plan=model.plan_encode(x.shape, tile=tile)).latent_dist.parameters
    errors[f"encode {tile}"] = float((made - exact).norm() / exact.norm())
    assert sum(taken) > 10, taken
    taken.clear()
print(json.dumps(errors))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this machine has no Triton")
def test_the_path_of_gpus_gives_the_same() -> None:
    errors = interpreted(_SCRIPT)
    assert len(errors) == 4
    # Float32 sums in another order.
    assert max(errors.values()) < 1e-5, errors
