"""What several test files share: networks of the golden files, the official code's own tiny ones, diffusers' twins."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastvideo_vae_core as fvae
from fastvideo_vae_core.config import VAEArchConfig, VAEConfig
from fastvideo_vae_core.testing.golden import Golden, fill, golden_path, load_golden, make_tensor
from fastvideo_vae_ltx2 import (
    LTX2_AUDIO,
    LTX20_VIDEO,
    LTX20_VOCODER,
    LTX23_VIDEO,
    LTX23_VOCODER,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    LTX2Vocoder,
)

# Published architectures, made narrow and shallow.
_SHALLOW = {"latent_channels": 8, "block_out_channels": (16, 32, 64, 64), "layers_per_block": (1, 2, 1, 1, 1)}
NARROW: dict[str, Any] = {
    "2.0": replace(
        LTX20_VIDEO, **_SHALLOW, decoder_block_out_channels=(16, 32, 64), decoder_layers_per_block=(1, 2, 1, 1)
    ),
    "2.3": replace(
        LTX23_VIDEO, **_SHALLOW, decoder_block_out_channels=(16, 32, 32, 64), decoder_layers_per_block=(1, 2, 1, 0, 1)
    ),
    "audio": replace(LTX2_AUDIO, base_channels=8, num_res_blocks=1, latent_channels=2, mel_bins=16),
    "vocoder 2.0": replace(LTX20_VOCODER, in_channels=32, hidden_channels=64),
    "vocoder 2.3": replace(
        LTX23_VOCODER,
        in_channels=32,
        hidden_channels=64,
        bwe_in_channels=16,
        bwe_hidden_channels=32,
        num_mel_channels=8,
        filter_length=128,
        window_length=128,
    ),
}
NARROW["timed"] = replace(NARROW["2.0"], timestep_conditioning=True)
NARROW["causal"] = replace(NARROW["2.0"], decoder_causal=True)


@dataclass(frozen=True)
class Published:
    """A golden file, its checkpoint as one official file with its configuration in the metadata, and that loaded."""

    golden: Golden
    path: Path
    model: Any


@dataclass(frozen=True)
class Official:
    """Networks of the official code with random weights, and their checkpoint as one file.

    Attributes:
        modules: by the names "encoder" and "decoder", or "vocoder".
        tensors: as the file has them, those of other networks and unread ones among them.
        config: as its metadata has it.
    """

    modules: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]

    def save(self, path: Path, prefix: str = "") -> Path:
        """Write the file, or one with the names behind a prefix alone."""
        tensors = {name.removeprefix(prefix): each for name, each in self.tensors.items() if name.startswith(prefix)}
        save_file(tensors, path, {"config": json.dumps(self.config)})
        return path


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Networks of the golden files by name, for as long as a block runs: up to 1,222 million numbers."""

    @contextmanager
    def build(name: str) -> Iterator[Published]:
        golden = load_golden(golden_path(f"{name}.safetensors"))
        path = tmp_path_factory.mktemp(name) / "ltx-2.safetensors"
        save_file(golden.state_dict(), path, {"config": json.dumps(golden.meta["config"])})
        try:
            # Some cases have sizes that only the official code takes; one file has a decoder only.
            run = VAEConfig(illegal_sizes="official")
            yield Published(golden, path, fvae.load(path, config=run, load_encoder=name != "ltx2_video_timestep"))
        finally:
            path.unlink()

    return build


@pytest.fixture(scope="session")
def random_model() -> Callable[[str | VAEArchConfig], Any]:
    """A model with random weights of the golden rule, as `load` gives it; narrow ones by their names in `NARROW`."""

    def build(which: str | VAEArchConfig) -> Any:
        arch = NARROW[which] if isinstance(which, str) else which
        return filled(MODELS[type(arch).__name__](VAEConfig(arch_config=arch)))

    return build


@pytest.fixture(scope="session")
def diffusers_twin() -> Callable[[Any], Any]:
    """diffusers' own model with the configuration and the weights of ours."""
    diffusers = pytest.importorskip("diffusers", reason="this machine has no diffusers to compare with")
    from diffusers.pipelines.ltx2 import vocoder as vocoders

    def build(model: Any) -> Any:
        if isinstance(model, LTX2Vocoder):
            kind = vocoders.LTX2VocoderWithBWE if model.arch.extension else vocoders.LTX2Vocoder
        else:
            kind = getattr(diffusers, type(model).__name__)
        known = inspect.signature(kind.__init__).parameters
        with torch.device("meta"):
            twin = kind(**{name: each for name, each in model.arch.to_dict().items() if name in known})
        # Copies, because ours puts its weights into an order in memory of its own.
        state = {name: each.clone() for name, each in model.state_dict().items()}
        if "mel_stft.mel_basis" in state:
            # A buffer that nothing reads, and one that is in no checkpoint.
            state["mel_stft.stft_fn.inverse_basis"] = torch.zeros_like(state["mel_stft.stft_fn.forward_basis"])
            twin.resampler = vocoders.UpSample1d(ratio=3, window_type="hann", persistent=False)
        twin.load_state_dict(state, strict=True, assign=True)
        return twin.eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def official() -> Callable[[str], Official]:
    """The official networks under the names of `NARROW`, and "audio 64"."""
    pytest.importorskip("ltx_core", reason="this machine has no ltx-core to compare with")
    from ltx_core.model import audio_vae, video_vae

    def build(name: str) -> Official:
        if name.startswith("audio"):
            # As narrow as can be, or with the mel bins that the official vocoders take.
            config = {"audio_vae": _audio_config(8, 16) if name == "audio" else _audio_config(32, 64)}
            halves = audio_vae.AudioEncoderConfigurator, audio_vae.AudioDecoderConfigurator
            return _autoencoder("audio_vae.", config, *halves)
        if name.startswith("vocoder"):
            # Its number of mel bins cannot be chosen.
            config = {"vocoder": _vocoder_config(name)}
            vocoder = _random(audio_vae.VocoderConfigurator.from_config(config), "vocoder.")
            tensors = {f"vocoder.{key}": each for key, each in vocoder.state_dict().items()}
            return Official({"vocoder": vocoder}, {**tensors, **_OTHERS}, config)
        config = {"vae": _video_config(name)}
        return _autoencoder("vae.", config, video_vae.VideoEncoderConfigurator, video_vae.VideoDecoderConfigurator)

    return build


def filled(model: nn.Module) -> Any:
    """Random weights; a spectrogram's bases are what they are everywhere."""
    fill(model, gains={"*upsamplers.*.weight": 2.0, "*.filter": 0.1, "*conv_out.weight": 0.5})
    for name, basis in model.state_dict().items():
        if name.endswith("forward_basis"):
            basis.copy_(make_tensor(name, basis.shape, "stft"))
        if name.endswith("mel_basis"):
            basis.abs_()
    return model.eval().requires_grad_(False)


def _autoencoder(prefix: str, config: Mapping[str, Any], encoder: Any, decoder: Any) -> Official:
    halves = {"encoder": encoder.from_config(config), "decoder": decoder.from_config(config)}
    tensors: dict[str, Tensor] = {}
    for half, module in halves.items():
        # The statistics are one and the same in both.
        _random(module, "")
        for key, each in module.state_dict().items():
            where = "" if key.startswith("per_channel_statistics.") else f"{half}."
            tensors[f"{prefix}{where}{key}"] = each
    # A published file has more of them, which nothing reads.
    tensors[f"{prefix}per_channel_statistics.mean-of-stds"] = torch.ones(3)
    return Official(halves, {**tensors, **_OTHERS}, config)


def _random(module: Any, prefix: str) -> Any:
    for key, each in module.state_dict().items():
        kind = "stft" if key.endswith("forward_basis") else None
        made = make_tensor(prefix + key, each.shape, kind, gain=1.5 if ".ups." in f".{key}" else 1.0)
        each.copy_(made.abs() / 8 if key.endswith("mel_basis") else made / 5 if key.endswith("filter") else made)
    return module.eval().requires_grad_(False)


def _video_config(name: str) -> dict[str, Any]:
    twice = {"multiplier": 2}
    encoder = [
        ["res_x", {"num_layers": 1}],
        ["compress_space_res", twice],
        ["res_x", {"num_layers": 2}],
        ["compress_time_res", twice],
        ["res_x", 1],
        ["compress_all_res", twice],
        ["res_x", {"num_layers": 1}],
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
    ]
    changes = [["compress_all", {"residual": True, **twice}]] * 3
    if name == "2.3":
        kinds = (("space", 2), ("time", 2), ("all", 1), ("all", 2))
        changes = [[f"compress_{kind}", {"multiplier": factor}] for kind, factor in kinds]
    decoder: list[Any] = [["res_x", {"num_layers": 1, "inject_noise": False}]]
    for change in changes:
        decoder += [change, ["res_x", {"num_layers": 2 if len(decoder) == 1 else 1}]]
    return {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "latent_channels": 8,
        "encoder_blocks": encoder,
        "decoder_blocks": decoder,
        "decoder_base_channels": 8,
        "timestep_conditioning": name == "timed",
        "causal_decoder": name == "causal",
        "something_that_nobody_reads": 1,
        **({"spatial_padding_mode": "zeros"} if name == "2.3" else {}),
    }


def _audio_config(width: int, bins: int) -> dict[str, Any]:
    network = {
        "ch": width,
        "ch_mult": [1, 2, 4],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "z_channels": 2,
        "mid_block_add_attention": False,
        "mel_bins": bins,
    }
    return {"model": {"params": {"sampling_rate": 16000, "ddconfig": network}}}


def _vocoder_config(name: str) -> dict[str, Any]:
    if name == "vocoder 2.0":
        return {"resblock": "1", "stereo": True, "upsample_initial_channel": 64}
    shared = {
        "resblock": "AMP1",
        "stereo": True,
        "activation": "snakebeta",
        "use_tanh_at_final": False,
        "use_bias_at_final": False,
    }
    first = {
        **shared,
        "upsample_initial_channel": 64,
        "upsample_rates": [5, 2, 2, 2, 2, 2],
        "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
    }
    second = {
        **shared,
        "upsample_initial_channel": 32,
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [12, 11, 4, 4, 4],
        "n_fft": 512,
        "hop_length": 80,
        "num_mels": 64,
        "input_sampling_rate": 16000,
        "output_sampling_rate": 48000,
    }
    return {"vocoder": first, "bwe": second}


MODELS = {
    "LTX2VideoArchConfig": AutoencoderKLLTX2Video,
    "LTX2AudioArchConfig": AutoencoderKLLTX2Audio,
    "LTX2VocoderArchConfig": LTX2Vocoder,
}
# What stands beside the autoencoders in a published file.
_OTHERS = {"model.diffusion_model.patchify_proj.weight": torch.ones(2, 2)}
