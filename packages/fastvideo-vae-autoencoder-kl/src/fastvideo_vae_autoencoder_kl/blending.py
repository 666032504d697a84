"""The overlapping tiles of published results, see `fastvideo_vae_core.blending`.

Source: huggingface/diffusers `autoencoder_kl.py`.
"""

from __future__ import annotations

from fastvideo_vae_core.blending import Blend

# What diffusers does behind `enable_tiling()`: its tiles are as large as the `sample_size` of a checkpoint, 512 for
# SD 1.x and 1024 for the others, and a quarter overlaps.
DIFFUSERS = Blend(name="diffusers", pixels=512, pixels_stride=384)
DIFFUSERS_1024 = Blend(name="diffusers", pixels=1024, pixels_stride=768)
