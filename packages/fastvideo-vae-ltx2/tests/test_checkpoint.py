"""Files that people have, and files that must be refused. The official code's own files are in test_parity.py too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastvideo_vae_core as fvae
from fastvideo_vae_core.loading import inspect
from fastvideo_vae_core.testing.golden import make_input
from fastvideo_vae_ltx2 import (
    LTX20_VIDEO,
    LTX20_VOCODER,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    LTX2VideoArchConfig,
    LTX2Vocoder,
    LTX2VocoderArchConfig,
)

COMPONENTS = {"video": AutoencoderKLLTX2Video, "audio": AutoencoderKLLTX2Audio, "vocoder": LTX2Vocoder}
# The official networks that go into one file, and where diffusers keeps ours in a pipeline.
PARTS = {"video": "2.3", "audio": "audio", "vocoder": "vocoder 2.3"}
FOLDERS = {"video": "vae", "audio": "audio_vae", "vocoder": "vocoder"}


@pytest.fixture(scope="module")
def everything(official: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three networks in one official file, beside a diffusion model."""
    tensors: dict[str, torch.Tensor] = {}
    config: dict[str, Any] = {}
    for name in PARTS.values():
        part = official(name)
        tensors |= part.tensors
        config |= part.config
    path = tmp_path_factory.mktemp("ltx") / "ltx-2.3-22b.safetensors"
    save_file(tensors, path, {"config": json.dumps(config)})
    return path


@pytest.fixture(scope="module")
def pipeline(random_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folders of a diffusers pipeline, and the models in them."""
    root = tmp_path_factory.mktemp("pipeline")
    (root / "model_index.json").write_text("{}")
    models = {component: random_model(name) for component, name in PARTS.items()}
    for component, model in models.items():
        save(model, root / FOLDERS[component])
    return root, models


def save(model: Any, folder: Path) -> None:
    """As diffusers does."""
    folder.mkdir()
    kind = "LTX2VocoderWithBWE" if isinstance(model, LTX2Vocoder) and model.arch.extension else type(model).__name__
    (folder / "config.json").write_text(json.dumps({"_class_name": kind, **model.arch.to_dict()}))
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")


def decoded(model: Any) -> torch.Tensor:
    """What a model makes of latents, or of a spectrogram."""
    if isinstance(model, LTX2Vocoder):
        return model(make_input("checkpoint", (1, 2, 3, model.arch.in_channels // 2), "mel"))
    bins = (model.arch.mel_bins // 4,) if isinstance(model, AutoencoderKLLTX2Audio) else (2, 2)
    return model.decode(make_input("checkpoint", (1, model.arch.latent_channels, 2, *bins), "latent")).sample


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_network_of_one_file(everything: Path, component: str) -> None:
    model = fvae.load(everything, component=component)
    assert type(model) is COMPONENTS[component]
    assert model.provenance.component == component
    assert bool(decoded(model).isfinite().all())


def test_the_video_is_meant_when_nothing_is_said(everything: Path) -> None:
    assert isinstance(fvae.load(everything), AutoencoderKLLTX2Video)


def test_inspecting_names_all_three(everything: Path) -> None:
    found = {each["component"]: each for each in inspect(everything)["components"] if each["family"] == "ltx2"}
    assert set(found) == set(COMPONENTS)
    assert not [each["problem"] for each in found.values() if each["problem"]]


@pytest.mark.parametrize(("component", "prefix"), [("video", "vae."), ("audio", "audio_vae."), ("vocoder", "vocoder.")])
def test_a_file_of_its_own(everything: Path, tmp_path: Path, official: Any, component: str, prefix: str) -> None:
    """As ComfyUI users split checkpoints: with the prefix, and without it; the vocoder's is stripped once."""
    whole = fvae.load(everything, component=component)
    for kept in ("", prefix):
        path = official(PARTS[component]).save(tmp_path / f"split{len(kept)}.safetensors", kept)
        alone = fvae.load(path, component=component)
        assert alone.provenance.checkpoint == whole.provenance.checkpoint
        assert torch.equal(decoded(alone), decoded(whole))


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_a_file(everything: Path, tmp_path: Path, half: str) -> None:
    tensors = {
        name: each for name, each in load_file(everything).items() if f"vae.{half}." in name or "channel" in name
    }
    path = tmp_path / "half.safetensors"
    config = {"config": json.dumps(_config(everything))}
    save_file({name: each for name, each in tensors.items() if name.startswith("vae.")}, path, config)
    loaded = fvae.load(path, load_encoder=half == "encoder", load_decoder=half == "decoder")
    assert hasattr(loaded, half)
    assert len(list(loaded.children())) == 1


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_diffusers_pipeline(pipeline: tuple[Path, dict[str, Any]], component: str) -> None:
    root, models = pipeline
    for loaded in (fvae.load(root, component=component), fvae.load(root, subfolder=FOLDERS[component])):
        assert type(loaded) is COMPONENTS[component]
        assert loaded.provenance.checkpoint == models[component].provenance.checkpoint
        assert torch.equal(decoded(loaded), decoded(models[component]))


def test_a_saved_vocoder_of_diffusers(random_model: Any, diffusers_twin: Any, tmp_path: Path) -> None:
    """With a buffer that nothing reads."""
    for name in ("vocoder 2.0", "vocoder 2.3"):
        model = random_model(name)
        folder = tmp_path / name
        diffusers_twin(model).save_pretrained(folder)
        assert torch.equal(decoded(fvae.load(folder)), decoded(model))


@pytest.mark.parametrize("arch", [LTX20_VIDEO, LTX20_VOCODER], ids=["video", "vocoder"])
def test_published_tensors_need_no_configuration(arch: Any, official: Any) -> None:
    """From names and shapes alone: a file that lost its metadata."""
    from fastvideo_vae_core.family import Evidence
    from fastvideo_vae_ltx2.checkpoint import infer_video, infer_vocoder

    video = isinstance(arch, LTX2VideoArchConfig)
    with torch.device("meta"):
        kind = AutoencoderKLLTX2Video if video else LTX2Vocoder
        state = kind(fvae.VAEConfig(arch_config=arch)).state_dict()
    shapes = {name: tuple(each.shape) for name, each in state.items()}
    evidence = Evidence(shapes=shapes, names=frozenset(shapes), stem="x", prefix="", layout="diffusers")
    inferred = (infer_video if video else infer_vocoder)(evidence)
    assert inferred.arch == arch
    assert inferred.variants == ("ltx2.0",)


def test_a_file_that_tells_nothing_is_refused(random_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "narrow.safetensors"
    save_file(random_model("2.0").state_dict(), path)
    with pytest.raises(fvae.CheckpointError, match=r"neither a configuration .* pass config="):
        fvae.load(path)
    config = random_model("2.0").arch.to_dict()
    assert torch.equal(decoded(fvae.load(path, config=config)), decoded(random_model("2.0")))


def test_the_decoder_of_ltx_25_is_refused_by_name(everything: Path, tmp_path: Path) -> None:
    """Its audio is that of LTX-2.3 and loads."""
    tensors, config = load_file(everything), _config(everything)
    diffused = {name: each for name, each in tensors.items() if not name.startswith("vae.decoder.")}
    diffused["vae.decoder.upsamples.0.proj.weight"] = torch.ones(2, 2)
    path = tmp_path / "ltx-2.5.safetensors"
    for vae in ({"_class_name": "CausalDiffusionVAE", "encoder": {}, "decoder": {}}, config["vae"]):
        save_file(diffused, path, {"config": json.dumps({**config, "vae": vae})})
        with pytest.raises(fvae.ConfigError, match=r"LTX-2\.5.*diffusion model"):
            fvae.load(path)
    assert isinstance(fvae.load(path, component="audio"), AutoencoderKLLTX2Audio)
    assert isinstance(fvae.load(path, component="vocoder"), LTX2Vocoder)
    with pytest.raises(fvae.ConfigError, match=r"LTX-2\.5"):
        LTX2VideoArchConfig.from_dict({"_class_name": "CausalDiffusionVAE"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_blocks": [["attn", {}]]}, "'attn' is not supported"),
        ({"encoder_blocks": [["res_x", 1], ["compress_all", {}], ["res_x", 1]]}, "'compress_all' is not supported"),
        ({"decoder_blocks": [["res_x", 1], ["res_x_y", {}]]}, "'res_x_y' is not supported"),
        ({"decoder_blocks": [["res_x", {"num_layers": 1, "inject_noise": True}]]}, "inject_noise"),
        ({"decoder_blocks": ["res_x"]}, "names and options"),
        ({"latent_log_var": "per_channel"}, "latent_log_var"),
        ({"norm_layer": "group_norm"}, "norm_layer"),
        ({"patch_size": 1 << 40}, "patch_size"),
        ({"latent_channels": "many"}, "latent_channels"),
    ],
    ids=str,
)
def test_other_networks_are_refused_before_anything_is_allocated(
    everything: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(fvae.ConfigError, match=message):
        LTX2VideoArchConfig.from_dict({"vae": {**_config(everything)["vae"], **changes}})


@pytest.mark.parametrize(
    "changes",
    [
        {"bwe_hidden_channels": 64},
        {"upsample_kernel_sizes": (3, 15, 8, 4, 4)},
        {"upsample_factors": (6, 5)},
        {"hidden_channels": 100},
        {"act_fn": "snakebeta"},
        {"resnet_dilations": ((1,), (1,))},
        {"resnet_dilations": ((1 << 40,),) * 3},
    ],
    ids=str,
)
def test_impossible_vocoders_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(fvae.ConfigError):
        LTX2VocoderArchConfig(**changes)


def test_another_video_autoencoder_is_not_taken_for_one(tmp_path: Path) -> None:
    """HunyuanVideo's blocks have the same names, and norms with weights."""
    stem = "encoder.mid_block.resnets.0"
    path = tmp_path / "hunyuan.safetensors"
    save_file({f"{stem}.conv1.conv.weight": torch.ones(2, 2, 3, 3, 3), f"{stem}.norm1.weight": torch.ones(2)}, path)
    with pytest.raises(fvae.CheckpointError, match="no network of ltx2 is recognised"):
        fvae.load(path, family="ltx2")


def test_a_truncated_file_is_refused(everything: Path, tmp_path: Path) -> None:
    path = tmp_path / "ltx-2.safetensors"
    path.write_bytes(everything.read_bytes()[: everything.stat().st_size // 2])
    with pytest.raises(fvae.CheckpointError, match="download it again"):
        fvae.load(path)


def test_metadata_that_is_no_configuration_is_refused(everything: Path, tmp_path: Path) -> None:
    path = tmp_path / "ltx-2.safetensors"
    for text in ("{", "[]"):
        save_file(load_file(everything), path, {"config": text})
        with pytest.raises(fvae.ConfigError, match="metadata"):
            fvae.load(path)


def _config(path: Path) -> Any:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as handle:
        return json.loads(handle.metadata()["config"])
