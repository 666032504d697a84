"""The overlapping tiles of published results, see `fastvideo_vae_core.blending`.

Source: huggingface/diffusers `autoencoder_kl_wan.py`.
"""

from __future__ import annotations

from fastvideo_vae_core.blending import Blend

# What diffusers does behind `enable_tiling()`. Encoding with Wan 2.2 counts in patches of two pixels there.
DIFFUSERS = Blend(name="diffusers", pixels=256, pixels_stride=192)
