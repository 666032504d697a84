"""Normalisation in the official order of operations, and latent files that remember where they come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastvideo_vae_core.errors import CheckpointError, MediaError, ShapeError
from fastvideo_vae_core.latents import (
    LatentFile,
    LatentInfo,
    LatentReader,
    LatentWriter,
    Provenance,
    read_latents,
    scale_latents,
    unscale_latents,
    write_latents,
)
from fastvideo_vae_core.testing.parity import relative_error

PROVENANCE = Provenance(family="toy_video", component="vae", variant="one", checkpoint="0123abcd")
FILE = LatentFile(
    latents=torch.arange(24.0).reshape(1, 2, 3, 2, 2),
    provenance=PROVENANCE,
    space="normalized",
    sample_shape=(1, 3, 5, 16, 16),
    frame_rate="24000/1001",
    sampling_rate=48_000,
)


class TestNormalisation:
    z = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.5, 1.0, 4.0])

    def test_the_order_of_operations_is_that_of_the_pipelines(self) -> None:
        """Bit for bit: diffusers' StableDiffusion3, Flux and StableDiffusionXL pipelines."""
        z, mean, std = self.z, self.mean.view(1, 3, 1, 1), self.std.view(1, 3, 1, 1)
        assert torch.equal(scale_latents(z, 0.13025), z * 0.13025)
        assert torch.equal(scale_latents(z, 0.3611, 0.1159), (z - 0.1159) * 0.3611)
        assert torch.equal(unscale_latents(z, 0.13025), z / 0.13025)
        assert torch.equal(unscale_latents(z, 0.3611, 0.1159), (z / 0.3611) + 0.1159)
        assert torch.equal(scale_latents(z, 0.5, None, self.mean, self.std), (z - mean) * 0.5 / std)
        assert torch.equal(unscale_latents(z, 0.5, None, self.mean, self.std), z * std / 0.5 + mean)

    @pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 4, 5), (2, 3, 4, 5, 6)], ids=["audio", "image", "video"])
    @pytest.mark.parametrize("with_means", [False, True])
    def test_it_has_an_inverse(self, shape: tuple[int, ...], with_means: bool) -> None:
        z = torch.randn(shape, dtype=torch.float64)
        means = (self.mean, self.std) if with_means else ()
        there = scale_latents(z, 0.25, None if with_means else 0.1, *means)
        assert relative_error(unscale_latents(there, 0.25, None if with_means else 0.1, *means), z) <= 1e-15


class TestFiles:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_what_was_written_comes_back(self, tmp_path: Path, dtype: torch.dtype) -> None:
        file = replace(FILE, latents=FILE.latents.to(dtype))
        write_latents(tmp_path / "z.safetensors", file)
        read = read_latents(tmp_path / "z.safetensors")
        assert read.latents.dtype == dtype
        assert torch.equal(read.latents, file.latents)
        assert replace(read, latents=file.latents) == file

    def test_what_is_unknown_is_left_out(self, tmp_path: Path) -> None:
        file = replace(FILE, provenance=replace(PROVENANCE, variant=None), frame_rate=None, sampling_rate=None)
        write_latents(tmp_path / "z.safetensors", file)
        assert replace(read_latents(tmp_path / "z.safetensors"), latents=file.latents) == file

    def test_the_metadata_can_be_read_without_this_package(self, tmp_path: Path) -> None:
        write_latents(tmp_path / "z.safetensors", FILE)
        with safe_open(tmp_path / "z.safetensors", framework="pt") as handle:
            metadata = handle.metadata()
        assert json.loads(metadata["provenance.family"]) == "toy_video"
        assert json.loads(metadata["space"]) == "normalized"
        assert json.loads(metadata["dtype"]) == "float32"
        assert json.loads(metadata["sample_shape"]) == [1, 3, 5, 16, 16]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_latents_that_are_not_finite_are_not_written(self, tmp_path: Path, value: float) -> None:
        with pytest.raises(MediaError, match="nothing was written"):
            write_latents(tmp_path / "z.safetensors", replace(FILE, latents=FILE.latents * value))
        assert not list(tmp_path.iterdir())

    def test_a_path_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(MediaError, match="does not exist"):
            write_latents(tmp_path / "absent" / "z.safetensors", FILE)
        assert not list(tmp_path.iterdir())

    def test_an_old_file_stays_when_writing_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "z.safetensors"
        write_latents(path, FILE)
        before = path.read_bytes()

        def fail(*_: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("fastvideo_vae_core.latents.save_file", fail)
        with pytest.raises(OSError, match="no space left"):
            write_latents(path, replace(FILE, latents=FILE.latents + 1))
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize(
        "metadata",
        [
            None,
            {},
            {"format": "something-else"},
            {"format": "fastvideo-vae-latents-1"},
            {"format": "fastvideo-vae-latents-1", "provenance.family": "{"},
        ],
    )
    def test_another_file_is_refused(self, tmp_path: Path, metadata: dict[str, str] | None) -> None:
        save_file({"latents": torch.zeros(1)}, tmp_path / "z.safetensors", metadata)
        with pytest.raises(MediaError, match=r"z\.safetensors"):
            read_latents(tmp_path / "z.safetensors")

    @pytest.mark.parametrize(
        ("name", "value"), [("space", '"scaled"'), ("sample_shape", "5"), ("sample_shape", '["a"]'), ("space", "[]")]
    )
    def test_metadata_that_lies_is_refused(self, tmp_path: Path, name: str, value: str) -> None:
        write_latents(tmp_path / "z.safetensors", FILE)
        with safe_open(tmp_path / "z.safetensors", framework="pt") as handle:
            metadata = {**handle.metadata(), name: value}
        save_file({"latents": FILE.latents}, tmp_path / "z.safetensors", metadata)
        with pytest.raises(MediaError, match="cannot be read as latents"):
            read_latents(tmp_path / "z.safetensors")

    def test_a_missing_an_empty_and_a_truncated_file_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "z.safetensors"
        with pytest.raises(MediaError):
            read_latents(path)
        write_latents(path, FILE)
        content = path.read_bytes()
        for length in (0, 7, 20, len(content) - 1):
            path.write_bytes(content[:length])
            with pytest.raises(MediaError, match=r"z\.safetensors"):
                read_latents(path)


class TestProvenance:
    def test_the_network_that_made_them_may_decode_them(self) -> None:
        FILE.check(PROVENANCE)
        FILE.check(replace(PROVENANCE, variant=None))

    @pytest.mark.parametrize(("item", "other"), [("family", "wan"), ("component", "audio"), ("checkpoint", "ffff0000")])
    def test_another_is_refused_with_what_differs(self, item: str, other: str) -> None:
        with pytest.raises(CheckpointError, match=rf"made by {item} .*, the model is {other}; .*--force"):
            FILE.check(replace(PROVENANCE, **{item: other}))


class TestPieces:
    """A file that was written piece by piece is the file that is written at once."""

    z = torch.randn(1, 3, 7, 2, 5, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("cuts", [[7], [1, 4, 2], [1] * 7])
    def test_the_cuts_do_not_show(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, cuts: list[int]
    ) -> None:
        monkeypatch.setattr("fastvideo_vae_core.latents._BLOCK", 300)
        info = _info(sample_shape=(1, 3, 13, 32, 80), color={"matrix": "bt709"}, pixel_aspect="16/15")
        whole = LatentFile(latents=self.z.to(dtype), **vars(info))
        write_latents(tmp_path / "whole.safetensors", whole)
        with LatentWriter(tmp_path / "pieces.safetensors") as writer:
            for piece in whole.latents.split(cuts, 2):
                writer.write(piece)
            assert writer.shape == whole.latents.shape
            writer.finish(info)
        read = read_latents(tmp_path / "pieces.safetensors")
        assert torch.equal(read.latents, whole.latents)
        assert replace(read, latents=whole.latents) == whole
        with safe_open(tmp_path / "whole.safetensors", framework="pt") as handle:
            metadata = handle.metadata()
        with safe_open(tmp_path / "pieces.safetensors", framework="pt") as handle:
            assert handle.metadata() == metadata

    def test_sound_and_pictures_too(self, tmp_path: Path) -> None:
        for shape in ((1, 8, 100), (1, 4, 6, 7)):
            z = torch.randn(shape)
            with LatentWriter(tmp_path / "z.safetensors") as writer:
                for piece in z.split(9, 2):
                    writer.write(piece)
                writer.finish(_info())
            assert torch.equal(read_latents(tmp_path / "z.safetensors").latents, z)

    def test_a_reader_gives_any_stretch(self, tmp_path: Path) -> None:
        write_latents(tmp_path / "z.safetensors", LatentFile(latents=self.z, **vars(_info())))
        reader = LatentReader(tmp_path / "z.safetensors")
        assert (reader.shape, reader.info) == (tuple(self.z.shape), _info())
        for start, stop in ((0, 7), (2, 5), (6, 9), (7, 9)):
            assert torch.equal(reader.read(start, stop), self.z[:, :, start:stop])
        with pytest.raises(MediaError, match="cannot be read as latents"):
            LatentReader(tmp_path / "absent.safetensors")

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path: Path, error: type[BaseException]) -> None:
        (tmp_path / "z.safetensors").write_bytes(b"before")

        def fail() -> None:
            with LatentWriter(tmp_path / "z.safetensors") as writer:
                writer.write(self.z)
                raise error

        with pytest.raises(error):
            fail()
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]

    def test_what_cannot_be_a_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "z.safetensors"
        with pytest.raises(MediaError, match="got no latents"), LatentWriter(path) as writer:
            writer.finish(_info())
        with pytest.raises(MediaError, match="got no latents"), LatentWriter(path) as writer:
            writer.write(self.z)
        with pytest.raises(MediaError, match="NaN or infinity"), LatentWriter(path) as writer:
            writer.write(self.z * torch.nan)
        for wrong in (self.z[:, :2], self.z[..., :2], self.z.double()):
            with pytest.raises(ShapeError, match="does not continue"):
                _write(path, self.z, wrong)
        with pytest.raises(MediaError, match="does not exist"), LatentWriter(tmp_path / "absent" / "z.safetensors"):
            pass
        assert not [*tmp_path.iterdir()]


def _write(path: Path, *pieces: torch.Tensor) -> None:
    with LatentWriter(path) as writer:
        for piece in pieces:
            writer.write(piece)
        writer.finish(_info())


def _info(**changes: Any) -> LatentInfo:
    return LatentInfo(**{"provenance": PROVENANCE, "space": "raw", "sample_shape": (1, 3, 13, 16, 40), **changes})
