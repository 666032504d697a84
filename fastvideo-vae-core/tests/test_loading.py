"""From a path or hub id to a model: strictly, in every layout, with an error that says the way out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvideo_vae_core import registry
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.errors import CheckpointError, ConfigError, FamilyError
from fastvideo_vae_core.family import Component, Evidence, Family, Inferred
from fastvideo_vae_core.loading import inspect, load, load_demo
from fastvideo_vae_core.testing import toys
from fastvideo_vae_core.testing.contract.files import save_diffusers
from fastvideo_vae_core.testing.plugins import installed
from fastvideo_vae_core.testing.toys import IMAGE, POINTS, ToyArchConfig, ToyAudio, ToyImage, ToyVideo, toy

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _toys_are_installed() -> Iterator[None]:
    with installed(*POINTS):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A toy as diffusers saves it."""
    return save_diffusers(toy(ToyImage), tmp_path / "model")


def edit(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace, add or (None) drop tensors of a saved model."""
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: each for name, each in tensors.items() if each is not None}, folder / WEIGHTS)


class TestSources:
    def test_a_folder_a_file_with_a_configuration_and_a_bare_file_are_one_model(self, folder: Path) -> None:
        bare = folder.parent / "somebody.safetensors"
        bare.write_bytes((folder / WEIGHTS).read_bytes())
        models = [load(source) for source in (folder, str(folder), folder / WEIGHTS, bare)]
        assert {type(model) for model in models} == {ToyImage}
        assert len({model.provenance.checkpoint for model in models}) == 1
        assert {model.config.arch_config for model in models} == {ToyArchConfig()}

    def test_the_subfolder_of_a_pipeline_is_found(self, folder: Path) -> None:
        pipeline = folder.parent / "pipeline"
        pipeline.mkdir()
        folder.rename(pipeline / "vae")
        (pipeline / "model_index.json").write_text("{}")
        assert isinstance(load(pipeline), ToyImage)
        (pipeline / "vae").rename(pipeline / "vae_1_0")
        assert isinstance(load(pipeline, subfolder="vae_1_0"), ToyImage)
        with pytest.raises(CheckpointError, match="holds no weights"):
            load(pipeline)

    def test_shards_are_read_through_their_index(self, folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        files = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        weight_map = {name: files[index % 2] for index, name in enumerate(names)}
        for file in files:
            save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert load(folder).provenance.checkpoint == toy(ToyImage).provenance.checkpoint

    def test_several_weight_files_are_ambiguous(self, folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "one.safetensors")
        assert isinstance(load(folder), ToyImage)
        (folder / "two.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match=r"several weight files \(one\.safetensors, two\.safetensors\)"):
            load(folder)

    def test_what_does_not_exist_is_said(self, tmp_path: Path) -> None:
        for source in (tmp_path / "absent", tmp_path / "absent.safetensors", "a/b/c", "absent.safetensors"):
            with pytest.raises(CheckpointError, match="does not exist"):
                load(source)

    def test_a_revision_of_a_local_path_is_refused(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="revision"):
            load(folder, revision="main")

    def test_the_file_may_be_replaced_while_the_model_lives(self, folder: Path) -> None:
        vae = load(folder)
        before = vae.provenance.checkpoint, {name: each.clone() for name, each in vae.state_dict().items()}
        size = (folder / WEIGHTS).stat().st_size
        with (folder / WEIGHTS).open("r+b") as file:
            file.write(bytes(size))
        assert vae.provenance.checkpoint == before[0]
        assert all(torch.equal(each, before[1][name]) for name, each in vae.state_dict().items())


class TestHub:
    """A hub that is a folder: it knows one repository, whose files are those of the folder."""

    @pytest.fixture
    def calls(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        calls: list[Any] = []
        (folder / "diffusion_pytorch_model.bin").write_bytes(b"the same weights again")

        def known(repository: str) -> None:
            if repository != "owner/toy":
                raise OSError("404 Client Error: Repository Not Found\nrequest id 5")

        def list_repo_files(repository: str, revision: str | None = None) -> list[str]:
            known(repository)
            return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

        def snapshot_download(repository: str, **options: Any) -> str:
            known(repository)
            calls.append(options)
            return str(folder)

        fake = SimpleNamespace(list_repo_files=list_repo_files, snapshot_download=snapshot_download)
        monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
        return calls

    def test_an_id_downloads_one_set_of_weights(self, calls: list[Any]) -> None:
        vae = load("owner/toy", revision="v1")
        assert isinstance(vae, ToyImage)
        assert vae.config.pretrained_path == "owner/toy"
        [call] = calls
        assert call["revision"] == "v1"
        assert WEIGHTS in call["allow_patterns"]
        assert "config.json" in call["allow_patterns"]
        assert not [pattern for pattern in call["allow_patterns"] if pattern.endswith(".bin")]

    def test_the_vae_of_a_pipeline_is_found(self, folder: Path, calls: list[Any]) -> None:
        (folder / "vae").mkdir()
        for name in ("config.json", WEIGHTS):
            (folder / name).rename(folder / "vae" / name)
        (folder / "diffusion_pytorch_model.bin").unlink()
        assert isinstance(load("owner/toy"), ToyImage)
        assert isinstance(load("owner/toy", subfolder="vae"), ToyImage)
        assert f"vae/{WEIGHTS}" in calls[0]["allow_patterns"]

    def test_an_unknown_repository_is_one_line(self, calls: list[Any]) -> None:
        with pytest.raises(CheckpointError, match=r"owner/unknown is no local path.*404 Client Error") as caught:
            load("owner/unknown")
        assert "\n" not in str(caught.value)

    def test_without_the_library_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(CheckpointError, match=r"fastvideo-vae-core\[hub\]"):
            load("owner/toy")


class TestStrictness:
    def test_missing_unexpected_and_misshapen_tensors_are_all_named(self, folder: Path) -> None:
        edit(
            folder,
            {
                "encoder.conv_out.bias": None,
                "decoder.block.norm.weight": None,
                "encoder.extra.weight": torch.ones(2),
                "decoder.conv_in.weight": torch.ones(8, 5, 3, 3),
            },
        )
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        message = str(caught.value)
        for part in (
            "toy_image (diffusers layout)",
            "2 missing: encoder.conv_out.bias, decoder.block.norm.weight",
            "1 unexpected: encoder.extra.weight",
            "1 misshapen: decoder.conv_in.weight (8, 5, 3, 3) for (8, 4, 3, 3)",
        ):
            assert part in message
        assert "\n" not in message

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite_are_refused(self, folder: Path, value: float) -> None:
        bias = torch.zeros(8)
        bias[3] = value
        edit(folder, {"encoder.block.conv.bias": bias})
        with pytest.raises(CheckpointError, match=r"1 tensors hold NaN or infinity: encoder\.block\.conv\.bias"):
            load(folder)

    def test_a_half_that_is_not_wanted_may_be_absent(self, folder: Path) -> None:
        edit(folder, {name: None for name in load_file(folder / WEIGHTS) if name.startswith("encoder.")})
        with pytest.raises(CheckpointError, match="missing: encoder"):
            load(folder)
        assert not hasattr(load(folder, load_encoder=False), "encoder")

    def test_a_hostile_configuration_is_refused_before_anything_is_allocated(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "width": 10**9}))
        monkeypatch.setattr(ToyImage, "__init__", lambda *_: pytest.fail("the model was built"))
        with pytest.raises(ConfigError, match=r"ToyArchConfig\.width must lie in"):
            load(folder)

    def test_an_unknown_key_of_the_configuration_is_refused(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"_class_name": "ToyImage", "wdth": 8}')
        with pytest.raises(ConfigError, match="has no field wdth"):
            load(folder)

    def test_an_unknown_class_says_which_package_to_install(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
        with pytest.raises(FamilyError, match="pip install fastvideo-vae-wan"):
            load(folder)

    def test_a_configuration_of_another_family_is_refused(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"_class_name": "ToyVideo"}')
        with pytest.raises(CheckpointError, match="no network of toy_video is recognised"):
            load(folder)

    def test_a_file_of_something_else_is_not_recognised(self, tmp_path: Path) -> None:
        save_file({"transformer.h.0.weight": torch.ones(2)}, tmp_path / "gpt.safetensors")
        with pytest.raises(CheckpointError, match=r"no network of .*toy_image.* is recognised .*transformer\.h\.0"):
            load(tmp_path / "gpt.safetensors")


class TestChoice:
    def test_family_and_component_are_checked_when_given(self, folder: Path) -> None:
        assert isinstance(load(folder, family="toy_image"), ToyImage)
        assert isinstance(load(folder, family="ToyImage", component="vae"), ToyImage)
        with pytest.raises(CheckpointError, match="no network of toy_audio is recognised"):
            load(folder, family="toy_audio")
        with pytest.raises(CheckpointError, match="is recognised"):
            load(folder, component="vocoder")
        with pytest.raises(FamilyError, match="wan"):
            load(folder, family="wan")

    def test_a_file_that_two_families_recognise_asks_for_one(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(toys, "VIDEO", replace(IMAGE, name="toy_video"))
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"pass family='toy_image' or family='toy_video'"):
            load(folder)
        assert isinstance(load(folder, family="toy_image"), ToyImage)


class TestVariants:
    """A family with two published checkpoints that differ in their scaling alone."""

    @pytest.fixture(autouse=True)
    def _variants(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(toys, "ONE", ToyArchConfig(scaling_factor=0.5), raising=False)
        monkeypatch.setattr(toys, "TWO", ToyArchConfig(scaling_factor=0.25), raising=False)
        monkeypatch.setattr(toys, "infer", lambda evidence: infer_variants(evidence))
        paths = {"one": f"{toys.__name__}:ONE", "two": f"{toys.__name__}:TWO"}
        component: Component = replace(IMAGE.components[0], variants=paths)
        family: Family = replace(IMAGE, components=(component,))
        monkeypatch.setattr(toys, "IMAGE", family)
        registry._import.cache_clear()

    def test_tensors_that_leave_it_open_ask_for_the_variant(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"more than one checkpoint; pass variant='one' or variant='two'"):
            load(folder)
        vae = load(folder, variant="two")
        assert vae.config.scaling_factor == 0.25
        assert vae.provenance.variant == "two"

    def test_a_configuration_settles_it(self, folder: Path) -> None:
        assert load(folder).provenance.variant == "one"
        with pytest.raises(CheckpointError, match="is no toy_image two: it is one"):
            load(folder, variant="two")

    def test_an_unknown_variant_lists_those_there_are(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="toy_image has no variant 'three'; it has one, two"):
            load(folder, variant="three")

    def test_other_sizes_are_none_of_them(self, tmp_path: Path) -> None:
        other = ToyImage(VAEConfig(arch_config=ToyArchConfig(width=16)))
        folder = save_diffusers(other, tmp_path / "wide")
        assert load(folder).provenance.variant is None
        with pytest.raises(CheckpointError, match="it is none of the published ones"):
            load(folder, variant="one")


def infer_variants(evidence: Evidence) -> Inferred:
    return Inferred(arch=ToyArchConfig(), variants=("one", "two"))


class TestSettings:
    def test_a_configuration_can_be_given_as_a_mapping_a_file_or_an_architecture(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | {"scaling_factor": 0.125}
        other = folder.parent / "other.json"
        other.write_text(json.dumps(config))
        for given in (config, other, str(other), VAEConfig(arch_config=ToyArchConfig(scaling_factor=0.125))):
            assert load(folder, config=given).config.scaling_factor == 0.125

    def test_settings_of_a_run_keep_the_architecture_that_was_found(self, folder: Path) -> None:
        vae = load(folder, config=VAEConfig(use_tiling=True, load_encoder=False))
        assert vae.config.arch_config == ToyArchConfig()
        assert vae.config.use_tiling
        assert not vae.config.load_encoder

    def test_loading_nothing_is_refused(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="both off"):
            load(folder, load_encoder=False, load_decoder=False)

    @pytest.mark.parametrize("dtype", [torch.float64, "float64"])
    def test_a_type_can_be_asked_for(self, folder: Path, dtype: torch.dtype | str) -> None:
        assert {each.dtype for each in load(folder, dtype=dtype).parameters()} == {torch.float64}

    def test_an_unknown_type_lists_those_there_are(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="float16, bfloat16, float32, float64, got 'int8'"):
            load(folder, dtype="int8")

    def test_the_stored_type_stays(self, folder: Path) -> None:
        edit(folder, {name: each.bfloat16() for name, each in load_file(folder / WEIGHTS).items()})
        vae = load(folder)
        assert {each.dtype for each in vae.parameters()} == {torch.bfloat16}
        assert vae.dtype == torch.bfloat16

    def test_a_half_of_mixed_types_gets_the_type_of_most_of_its_numbers(self, folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(folder, {name: each.half() for name, each in tensors.items() if "norm" not in name})
        assert {each.dtype for each in load(folder).parameters()} == {torch.float16}


class TestInspect:
    def test_it_says_what_would_be_loaded(self, folder: Path) -> None:
        told = inspect(folder)
        state = toy(ToyImage).state_dict()
        assert json.loads(json.dumps(told)) == told
        assert told["class_name"] == "ToyImage"
        assert told["tensors"] == len(state)
        assert told["parameters"] == sum(each.numel() for each in state.values())
        assert told["bytes"] == 4 * told["parameters"]
        [component] = told["components"]
        assert (component["family"], component["layout"], component["problem"]) == ("toy_image", "diffusers", None)
        assert component["dtypes"] == ["float32"]

    def test_a_file_of_something_else_has_no_components(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
        assert inspect(tmp_path / "a.safetensors")["components"] == []

    def test_a_problem_of_the_configuration_is_told_and_not_raised(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"_class_name": "ToyImage", "width": 1000000000}')
        [component] = inspect(folder)["components"]
        assert "width must lie in" in component["problem"]


def test_a_family_without_demonstration_weights_says_so() -> None:
    with pytest.raises(FamilyError, match="ships no demonstration weights"):
        load_demo("toy_audio")


@pytest.mark.parametrize("model", [ToyImage, ToyVideo, ToyAudio])
@pytest.mark.parametrize("halves", [("encoder",), ("decoder",), ("encoder", "decoder")], ids="+".join)
def test_a_bare_file_of_any_half_of_any_family_is_recognised(
    tmp_path: Path, model: type[toys.Toy], halves: Sequence[str]
) -> None:
    state = {name: each for name, each in toy(model).state_dict().items() if name.startswith(tuple(halves))}
    save_file(state, tmp_path / "bare.safetensors")
    loaded = load(tmp_path / "bare.safetensors", load_encoder="encoder" in halves, load_decoder="decoder" in halves)
    assert type(loaded) is model
    assert loaded.state_dict().keys() == state.keys()
