"""The networks as they run on a GPU, with their kernels in Triton's interpreter, against their definitions."""

from __future__ import annotations

import importlib.util

import pytest

from fastvideo_vae_core.testing.interpreter import interpreted

# The device of the cache is what chooses the kernels; the tensors stay on the CPU.
_SCRIPT = """
import itertools, json, torch, unittest.mock
from dataclasses import replace
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.ops import between, conv1d
from fastvideo_vae_core.ops.causal import Cache, CausalConv3d
from fastvideo_vae_core.testing.golden import fill, make_input
from fastvideo_vae_core.testing.parity import relative_error
from fastvideo_vae_ltx2 import (
    LTX20_VIDEO, LTX20_VOCODER, LTX2_AUDIO, AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2Vocoder, audio)

two = {"down_block_types": ("LTX2VideoDownBlock3D",) * 2, "spatio_temporal_scaling": (True,) * 2,
       "decoder_spatio_temporal_scaling": (True,) * 2, "decoder_inject_noise": (False,) * 3,
       "spatial_compression_ratio": None, "temporal_compression_ratio": None}
reflecting = replace(
    LTX20_VIDEO, **two, latent_channels=4, block_out_channels=(8, 16), decoder_block_out_channels=(16, 32),
    layers_per_block=(1, 0, 1), decoder_layers_per_block=(1, 0, 1), downsample_type=("spatial", "spatiotemporal"),
    upsample_type=("spatiotemporal", "spatial"), upsample_residual=(True, True), upsample_factor=(2, 2), patch_size=1,
    timestep_conditioning=True)
plain = replace(reflecting, decoder_spatial_padding_mode="zeros", upsample_residual=(False,) * 2,
                timestep_conditioning=False)
errors = {}
with torch.no_grad():
    for name, arch in (("reflecting", reflecting), ("plain", plain)):
        vae = fill(AutoencoderKLLTX2Video(VAEConfig(arch_config=arch))).eval().requires_grad_(False)
        z = make_input("kernels", (2, 4, 3, 2, 3), "latent")
        x = make_input("kernels", vae.decoded_shape(z.shape), "video")
        sample, parameters = vae._decode(z), vae._encode(x)
        for layer in vae.modules():
            if isinstance(layer, CausalConv3d):
                layer.arrange()
        for chunk in (1, 3):
            caches = Cache(torch.device("cuda")), Cache(torch.device("cuda"))
            made = vae._decode(z, chunk, caches[0]), vae._encode(x, chunk, caches[1])
            errors[f"{name} decode {chunk}"] = relative_error(made[0], sample)
            errors[f"{name} encode {chunk}"] = relative_error(made[1], parameters)
    vae = fill(AutoencoderKLLTX2Audio(VAEConfig(arch_config=replace(LTX2_AUDIO, base_channels=32, latent_channels=2))))
    vae.eval().requires_grad_(False)
    z, x = (make_input("kernels", shape, kind) for shape, kind in (((1, 2, 3, 16), "latent"), ((1, 2, 9, 64), "mel")))
    sample, parameters = vae._decode(z), vae._encode(x)
    audio._fuses = lambda x, weight: True
    for plain in (False, True):
        audio._plain = lambda x: plain
        errors[f"audio decode {plain}"] = relative_error(vae._decode(z), sample)
        errors[f"audio encode {plain}"] = relative_error(vae._encode(x), parameters)
    # In both layouts. A spectrogram of three frames leaves samples that no dilation divides.
    gpu = {"act_fn": "leaky_relu", "antialias": False}, {"act_fn": "snakebeta", "antialias": True}
    for generator, last in itertools.product(gpu, (False, True)):
        arch = replace(LTX20_VOCODER, hidden_channels=4, in_channels=8, upsample_kernel_sizes=(5,),
                       upsample_factors=(3,), resnet_kernel_sizes=(3, 5, 7), **generator)
        vocoder = fill(LTX2Vocoder(VAEConfig(arch_config=arch))).eval().requires_grad_(False)
        mel = make_input("kernels", (1, 8, 3), "latent")
        waveform = vocoder._decode(mel)
        with unittest.mock.patch.multiple(
            conv1d, device_of=lambda x: torch.device("cuda"), _is_channels_last=lambda device, dtype: last
        ), unittest.mock.patch.object(between, "fuses", lambda *tensors: True):
            errors[f"vocoder {arch.act_fn} {last}"] = relative_error(vocoder._decode(mel), waveform)
print(json.dumps(errors))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this machine has no Triton")
def test_the_networks_with_their_kernels() -> None:
    errors = interpreted(_SCRIPT)
    assert len(errors) == 16
    # float32 in another order of operations, through some ten layers.
    assert max(errors.values()) < 5e-6, errors
