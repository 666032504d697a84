"""The overlapping tiles of published results, see `fastvideo_vae_core.blending`.

Source: Tencent-Hunyuan/Hunyuan-GameCraft-1.0 `hymm_sp/vae/autoencoder_kl_causal_3d.py`; huggingface/diffusers
`autoencoder_kl_hunyuan_video.py`; hao-ai-lab/FastVideo `fastvideo/models/vaes/common.py`.
"""

from __future__ import annotations

from fastvideo_vae_core.blending import Blend

__all__ = ["DIFFUSERS", "DIFFUSERS_FRAMEWISE", "OFFICIAL", "Blend"]

# The defaults of the official code: a quarter of a tile overlaps. Its pipelines always run so.
OFFICIAL = Blend(name="official", frames=64, frames_stride=48, pixels=256, pixels_stride=192)
# What diffusers does when nothing is switched on or off, and what it does behind `enable_tiling()`. FastVideo's
# defaults are the latter.
DIFFUSERS_FRAMEWISE = Blend(name="diffusers framewise", frames=16, frames_stride=12)
DIFFUSERS = Blend(name="diffusers", frames=16, frames_stride=12, pixels=256, pixels_stride=192)
