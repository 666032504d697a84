"""Checkpoint files are untrusted: they hold tensors or are refused, and nothing in them runs."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from fastvideo_vae_core.checkpoint import (
    IDENTITY,
    RenameTable,
    Rule,
    TensorInfo,
    canonical_infos,
    fingerprint,
    fits,
    listing,
    open_checkpoint,
    recognise,
    shards,
)
from fastvideo_vae_core.errors import CheckpointError
from fastvideo_vae_core.testing.payload import Payload
from fastvideo_vae_core.testing.toys import AUDIO, IMAGE, VIDEO, ToyImage, toy

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2, dtype=torch.int64)}


def torch_bytes(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def safetensors_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


class TestReading:
    def test_safetensors_are_listed_without_being_read(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        save_file(TENSORS, path, {"config": "{}"})
        checkpoint = open_checkpoint([path])
        assert checkpoint.infos == {
            "a.weight": TensorInfo((2, 3), torch.float32),
            "b": TensorInfo((), torch.int64),
        }
        assert checkpoint.metadata == {"config": "{}"}
        assert torch.equal(checkpoint.read("a.weight"), TENSORS["a.weight"])

    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    @pytest.mark.parametrize("nested", [True, False], ids=["state_dict", "bare"])
    def test_pickles_of_tensors_open(self, tmp_path: Path, suffix: str, zipped: bool, nested: bool) -> None:
        path = tmp_path / f"model{suffix}"
        content = {"state_dict": TENSORS, "global_step": 7} if nested else {**TENSORS, "global_step": 7}
        path.write_bytes(torch_bytes(content, _use_new_zipfile_serialization=zipped))
        checkpoint = open_checkpoint([path])
        assert set(checkpoint.infos) == set(TENSORS)
        assert torch.equal(checkpoint.read("a.weight"), TENSORS["a.weight"])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
    def test_types_are_told(self, tmp_path: Path, dtype: torch.dtype) -> None:
        path = tmp_path / "model.sft"
        save_file({"a": torch.ones(3).to(dtype)}, path)
        assert open_checkpoint([path]).infos["a"] == TensorInfo((3,), dtype)

    def test_shards_are_one_checkpoint(self, tmp_path: Path) -> None:
        for name, tensor in TENSORS.items():
            save_file({name: tensor}, tmp_path / f"{name}.safetensors")
        checkpoint = open_checkpoint([tmp_path / "a.weight.safetensors", tmp_path / "b.safetensors"])
        assert set(checkpoint.infos) == set(TENSORS)
        assert torch.equal(checkpoint.read("b"), TENSORS["b"])

    def test_shards_that_share_a_tensor_are_refused(self, tmp_path: Path) -> None:
        for name in "ab":
            save_file(TENSORS, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=r"b\.safetensors and another shard both hold a\.weight, b"):
            open_checkpoint([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


class TestDamage:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_a_missing_an_empty_and_a_folder_are_refused(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"model{suffix}"
        with pytest.raises(CheckpointError, match="does not exist"):
            open_checkpoint([path])
        path.touch()
        with pytest.raises(CheckpointError, match="empty"):
            open_checkpoint([path])
        path.unlink()
        path.mkdir()
        with pytest.raises(CheckpointError, match="no file"):
            open_checkpoint([path])

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.safetensors", save(TENSORS)),
            ("a.pt", torch_bytes(TENSORS)),
            ("a.ckpt", torch_bytes(TENSORS, _use_new_zipfile_serialization=False)),
        ],
        ids=["safetensors", "zip", "legacy"],
    )
    def test_every_truncation_is_refused(self, tmp_path: Path, name: str, content: bytes) -> None:
        path = tmp_path / name
        for length in range(1, len(content), max(len(content) // 40, 1)):
            path.write_bytes(content[:length])
            with pytest.raises(CheckpointError) as caught:
                open_checkpoint([path])
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "content",
        [
            safetensors_bytes({}),
            safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
            safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
            safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8)),
            safetensors_bytes({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}, bytes(8)),
            safetensors_bytes({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)),
            safetensors_bytes({"a": {"dtype": "X32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
            safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(16)),
            safetensors_bytes([1, 2]),
            safetensors_bytes({}, length=2**63),
            safetensors_bytes({}, length=10**6),
            b"<!DOCTYPE html><html>404</html>",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        ],
        ids=lambda content: str(content[8:60]),
    )
    def test_headers_that_lie_are_refused(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            open_checkpoint([path])

    @settings(max_examples=60, deadline=None, database=None)
    @given(data=st.data())
    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("zipped", [True, False, None], ids=["zip", "legacy", "safetensors"])
    def test_flipped_bytes_are_refused_or_harmless(
        self, tmp_path_factory: pytest.TempPathFactory, zipped: bool | None, data: st.DataObject
    ) -> None:
        content = bytearray(
            save(TENSORS) if zipped is None else torch_bytes(TENSORS, _use_new_zipfile_serialization=zipped)
        )
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path = tmp_path_factory.mktemp("flipped") / ("a.safetensors" if zipped is None else "a.pt")
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            checkpoint = open_checkpoint([path])
            for name, info in checkpoint.infos.items():
                assert checkpoint.read(name).shape == info.shape

    @pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), 5, "text", None], ids=lambda x: str(x)[:8])
    def test_a_pickle_of_something_else_is_refused(self, tmp_path: Path, content: object) -> None:
        path = tmp_path / "model.pt"
        path.write_bytes(torch_bytes(content))
        with pytest.raises(CheckpointError, match="must hold a dictionary of tensors"):
            open_checkpoint([path])

    def test_a_dictionary_without_tensors_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "model.pt"
        path.write_bytes(torch_bytes({"a": 1, 5: torch.ones(2)}))
        with pytest.raises(CheckpointError, match="holds no tensors"):
            open_checkpoint([path])

    def test_an_archive_of_something_else_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "model.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
        with pytest.raises(CheckpointError):
            open_checkpoint([path])


class TestPayload:
    def test_the_payload_would_run_if_it_were_let(self, tmp_path: Path) -> None:
        pickle.loads(pickle.dumps({"a": Payload(tmp_path / "proof")}))
        assert (tmp_path / "proof").exists()

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
    def test_code_in_a_pickle_does_not_run(self, tmp_path: Path, form: str) -> None:
        content = {**TENSORS, "evil": Payload(tmp_path / "proof")}
        path = tmp_path / "model.ckpt"
        if form == "bare pickle":
            path.write_bytes(pickle.dumps({"evil": Payload(tmp_path / "proof")}))
        else:
            path.write_bytes(torch_bytes(content, _use_new_zipfile_serialization=form == "zip"))
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint([path])
        assert not (tmp_path / "proof").exists()
        assert "\n" not in str(caught.value)

    def test_a_pickle_that_is_called_safetensors_does_not_run(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(torch_bytes({"evil": Payload(tmp_path / "proof")}))
        with pytest.raises(CheckpointError, match="no whole safetensors file"):
            open_checkpoint([path])
        assert not (tmp_path / "proof").exists()


class TestShardIndex:
    def write(self, folder: Path, content: object) -> Path:
        path = folder / "model.safetensors.index.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def test_it_names_files_beside_it(self, tmp_path: Path) -> None:
        index = self.write(tmp_path, {"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}})
        assert shards(index) == (tmp_path / "1.safetensors", tmp_path / "2.safetensors")

    @pytest.mark.parametrize(
        "name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", None, 5]
    )
    def test_it_cannot_name_a_file_elsewhere(self, tmp_path: Path, name: object) -> None:
        save_file(TENSORS, tmp_path / "secret.safetensors")
        (tmp_path / "model").mkdir()
        index = self.write(tmp_path / "model", {"weight_map": {"a": name}})
        with pytest.raises(CheckpointError, match="outside its folder"):
            shards(index)

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": ["b"]}}'])
    def test_anything_else_is_refused(self, tmp_path: Path, content: str) -> None:
        with pytest.raises(CheckpointError, match="no shard index"):
            shards(self.write(tmp_path, content))

    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        index = self.write(tmp_path, {"weight_map": {"a": "absent.safetensors"}})
        with pytest.raises(CheckpointError, match=r"absent\.safetensors does not exist"):
            open_checkpoint(shards(index))


class TestRenaming:
    def test_the_first_rule_that_matches_from_end_to_end_counts(self) -> None:
        table = RenameTable([Rule(r"a\.(\d)", r"b.\1"), Rule("drop", None), Rule(r"(.+)", r"kept.\1", reshape=True)])
        assert table("a.1") == Rule(r"a\.(\d)", "b.1")
        assert table("drop") == Rule("drop", None)
        assert table("a.12") == Rule(r"(.+)", "kept.a.12", reshape=True)
        assert RenameTable([Rule("a", "b")])("xa") is None

    def test_the_identity_keeps_every_name(self) -> None:
        rule = IDENTITY("any.thing")
        assert rule is not None
        assert rule.target == "any.thing"

    def test_axes_of_length_one_may_differ_where_a_rule_says_so(self) -> None:
        assert fits((2, 3, 1, 1), (2, 3), reshape=True)
        assert fits((2, 3), (2, 3), reshape=False)
        assert not fits((2, 3, 1, 1), (2, 3), reshape=False)
        assert not fits((2, 3, 1, 1), (3, 2), reshape=True)
        assert not fits((2, 3, 1, 1), (6,), reshape=True)

    def test_a_long_list_is_cut(self) -> None:
        assert listing("abc") == "a, b, c"
        assert listing("abcdefg") == "a, b, c, d, e and 2 more"


class TestRecognition:
    def checkpoint(self, folder: Path, tensors: dict[str, Tensor]) -> Any:
        save_file(tensors, folder / "a.safetensors")
        return open_checkpoint([folder / "a.safetensors"])

    def test_names_and_axes_tell_the_family(self, tmp_path: Path) -> None:
        checkpoint = self.checkpoint(tmp_path, toy(ToyImage).state_dict())
        [found] = recognise(checkpoint, [AUDIO, VIDEO, IMAGE])
        assert (found.family.name, found.layout.name, found.prefix, found.unexpected) == (
            "toy_image",
            "diffusers",
            "",
            (),
        )
        assert canonical_infos(checkpoint, found) == checkpoint.infos

    @pytest.mark.parametrize("half", ["encoder", "decoder"])
    def test_either_half_is_enough(self, tmp_path: Path, half: str) -> None:
        tensors = {name: each for name, each in toy(ToyImage).state_dict().items() if name.startswith(half)}
        assert len(recognise(self.checkpoint(tmp_path, tensors), [IMAGE])) == 1

    def test_something_else_is_not_recognised(self, tmp_path: Path) -> None:
        assert recognise(self.checkpoint(tmp_path, TENSORS), [IMAGE, VIDEO, AUDIO]) == []


class TestFingerprint:
    def test_it_tells_weights_apart_and_not_layouts_or_types(self) -> None:
        one = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}
        same = {"b": torch.ones(3).half(), "a": torch.arange(6.0, dtype=torch.float64).reshape(2, 3, 1, 1)}
        assert fingerprint(one.items()) == fingerprint(same.items())
        for other in (
            {**one, "b": torch.ones(4)},
            {**one, "b": torch.ones(3) + 1e-6},
            {"a": one["a"], "c": one["b"]},
            {"a": one["a"].reshape(3, 2), "b": one["b"]},
        ):
            assert fingerprint(one.items()) != fingerprint(other.items())
