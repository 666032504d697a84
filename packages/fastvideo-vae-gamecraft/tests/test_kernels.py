"""The path of GPUs through the whole network, in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import importlib.util

import pytest

from fastvideo_vae_core.testing.interpreter import interpreted

_SCRIPT = """
import json, torch
from dataclasses import replace
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.ops import clip
from fastvideo_vae_core.ops.clip import Run
from fastvideo_vae_core.testing.golden import fill
from fastvideo_vae_gamecraft import GAMECRAFT, AutoencoderKLHunyuanVideo

# The kernels are for 16 bits on a GPU; float32, so that they can be told from the definitions.
clip._FUSED = (torch.float32,)
torch.set_num_threads(1)
arch = replace(
    GAMECRAFT,
    block_out_channels=(4, 8, 8),
    down_block_types=("HunyuanVideoDownBlock3D",) * 3,
    up_block_types=("HunyuanVideoUpBlock3D",) * 3,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=2,
    spatial_compression_ratio=4,
)
model = AutoencoderKLHunyuanVideo(VAEConfig(arch_config=arch))
fill(model, gains={"decoder.conv_out.conv.weight": 0.5}).requires_grad_(False)
errors = {}
for batch in (1, 2):
    z = torch.randn(batch, 4, 2, 1, 2, generator=torch.Generator().manual_seed(0))
    x = model.decode(z).sample
    # A few pieces; one item of a batch at a time lies in memory otherwise than two.
    run = Run(torch.device("cuda"), 4 * 4 * 8 * 8)
    exact = model.encode(x).latent_dist.parameters
    errors[f"decode {batch}"] = float((model._decode(z, run) - x).norm() / x.norm())
    errors[f"encode {batch}"] = float((model._encode(x, run) - exact).norm() / exact.norm())
print(json.dumps(errors))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this machine has no Triton")
def test_the_path_of_gpus_gives_the_same() -> None:
    errors = interpreted(_SCRIPT)
    assert len(errors) == 4
    # Float32 sums in another order, upsampling folded into the convolutions.
    assert max(errors.values()) < 1e-5, errors
