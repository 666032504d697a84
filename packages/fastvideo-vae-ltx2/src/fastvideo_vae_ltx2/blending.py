"""The overlapping tiles of published results, see `fastvideo_vae_core.blending`.

Source: huggingface/diffusers `autoencoder_kl_ltx2.py`.
"""

from __future__ import annotations

from fastvideo_vae_core.blending import Blend

# What diffusers does behind `enable_tiling()`, and with frames too, behind `use_framewise_decoding`.
DIFFUSERS = Blend(name="diffusers", pixels=512, pixels_stride=448)
DIFFUSERS_FRAMEWISE = Blend(name="diffusers framewise", frames=16, frames_stride=8, pixels=512, pixels_stride=448)
