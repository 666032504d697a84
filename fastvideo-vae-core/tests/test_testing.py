"""The tools that families are tested with: they must see what is wrong, and rebuild what the references were given."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fastvideo_vae_core.metrics import psnr
from fastvideo_vae_core.plan import Direction
from fastvideo_vae_core.testing.conformance import ConformanceSuite
from fastvideo_vae_core.testing.contract.hooks import distance
from fastvideo_vae_core.testing.golden import ENVIRONMENT, fill, golden_path, load_golden, make_input, make_tensor
from fastvideo_vae_core.testing.miniature import VideoMiniatureSuite
from fastvideo_vae_core.testing.parity import Divergence, assert_close, first_divergence, relative_error
from fastvideo_vae_core.testing.toys import Past, Toy, ToyImage, ToyVideo, toy
from fastvideo_vae_core.tiling import Axis, Step

GOLDENS = (
    "autoencoder_flux",
    "autoencoder_kl",
    "gamecraft",
    "ltx23_video",
    "ltx23_vocoder",
    "ltx2_audio",
    "ltx2_video",
    "ltx2_video_timestep",
    "ltx2_vocoder",
    "oobleck",
    "wan21",
    "wan22",
)


class TestErrors:
    def test_relative_error(self) -> None:
        x = torch.tensor([3.0, 4.0])
        assert relative_error(x, x) == 0
        assert relative_error(x + torch.tensor([0.0, 0.5]), x) == 0.1
        assert relative_error(x.half(), x.double()) == 0
        assert math.isnan(relative_error(x * torch.nan, x))
        assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
        assert relative_error(x, torch.zeros(2)) == math.inf
        with pytest.raises(AssertionError, match=r"shape \(2,\), got \(1,\)"):
            relative_error(x[:1], x)

    def test_assert_close_gives_the_error_and_the_reason(self) -> None:
        x = torch.tensor([1.0, 1.0])
        assert assert_close(x, x, 0, "the same") == 0
        for wrong in (x + 1e-3, x * torch.nan):
            with pytest.raises(AssertionError, match=r"more than 1e-05 \(float32\)"):
                assert_close(wrong, x, 1e-5, "float32")

    def test_distance_is_infinite_where_nothing_can_be_compared(self) -> None:
        x = torch.zeros(2)
        assert distance(x + 0.5, x) == 0.5
        assert distance(x[:1], x) == math.inf
        assert distance(x * torch.nan, x) == math.inf


class TestFirstDivergence:
    z = make_input("divergence", (1, 4, 5, 7), "latent")

    def decode(self, model: nn.Module) -> object:
        return model.decode(self.z)  # type: ignore[operator]

    def test_equal_networks_do_not_diverge(self) -> None:
        assert first_divergence(toy(ToyImage), toy(ToyImage), self.decode) is None

    def test_a_wrong_epsilon_is_found_at_the_first_layer_behind_it(self) -> None:
        wrong = toy(ToyImage)
        wrong.decoder.block.norm.eps = 0.1  # type: ignore[union-attr, assignment]
        found = first_divergence(wrong, toy(ToyImage), self.decode)
        assert found is not None
        assert found.layer == "decoder.block.conv"
        assert 1e-3 < found.error < 1
        assert str(found).startswith("first divergence at decoder.block.conv: ")

    def test_a_wrong_weight_is_found_at_its_layer(self) -> None:
        wrong = toy(ToyImage)
        wrong.decoder.conv_out.bias.data += 1  # type: ignore[operator, union-attr]
        found = first_divergence(wrong, toy(ToyImage), self.decode)
        assert found is not None
        # Behind the first convolution, the one of the block, and the block.
        assert (found.layer, found.compared) == ("decoder.conv_out", 3)

    def test_names_can_be_mapped(self) -> None:
        one = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        other = nn.ModuleDict({"a": one[0], "b": nn.Linear(2, 2)})
        names = {"a": "0", "b": "1"}

        def run(model: nn.Module) -> Tensor:
            first, second = model.children()
            return second(first(torch.ones(1, 2)))

        found = first_divergence(one, other, run, names=names)
        assert found is not None
        assert (found.layer, found.compared) == ("1", 1)
        assert first_divergence(one, other, run, names=names.__getitem__) == found
        with pytest.raises(ValueError, match="no layers of equal names"):
            first_divergence(one, other, run)

    def test_calls_of_one_layer_are_told_apart_and_shapes_count(self) -> None:
        layer = nn.ModuleDict({"f": nn.Identity()})

        def run(model: nn.Module, last: int = 3) -> None:
            for size in (2, 2, last):
                model["f"](torch.ones(1, size))  # type: ignore[index]

        other = nn.ModuleDict({"f": nn.Identity()})
        found = first_divergence(layer, other, lambda model: run(model, 3 if model is layer else 4))
        assert found == Divergence("f", 2, math.inf, 1e-5, 2)
        assert "at f (call 2): inf" in str(found)

    def test_layers_that_overwrite_in_place_are_compared_as_they_left(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.f = nn.Identity()

            def forward(self, x: Tensor) -> Tensor:
                return self.f(x).add_(1)

        class Other(Block):
            def forward(self, x: Tensor) -> Tensor:
                return self.f(x) + 1

        assert first_divergence(Block(), Other(), lambda model: model(torch.ones(2))) is None

    def test_no_hook_is_left_behind(self) -> None:
        one, other = toy(ToyImage), toy(ToyImage)
        first_divergence(one, other, self.decode)
        assert not [module for model in (one, other) for module in model.modules() if module._forward_hooks]


class TestGoldens:
    @pytest.mark.parametrize("name", GOLDENS)
    def test_every_input_comes_out_as_the_reference_had_it(self, name: str) -> None:
        golden = load_golden(golden_path(f"{name}.safetensors"))
        for case in golden.cases:
            assert golden.inputs(case)

    def test_weights_come_out_as_the_reference_had_them(self) -> None:
        """A small checkpoint; each family checks its own."""
        golden = load_golden(golden_path("ltx2_audio.safetensors"))
        assert len(golden.state_dict()) == len(golden.meta["tensors"])

    def test_another_generator_would_be_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        golden = load_golden(golden_path("ltx2_audio.safetensors"))
        monkeypatch.setitem(golden.meta, "salt", "other")  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="differently on this machine"):
            golden.inputs(golden.cases[0])
        with pytest.raises(RuntimeError, match="differently on this machine"):
            golden.state_dict()

    def test_a_stored_output_is_compared_with_its_stride_and_shape(self) -> None:
        golden = load_golden(golden_path("autoencoder_kl.safetensors"))
        case = golden.case("dec_12x16")
        spec = case["outputs"]["decode"]
        made = torch.zeros(spec["shape"])
        made.view(-1)[:: spec["stride"]] = golden.tensors[spec["tensor"]]
        assert golden.error(case, made) == 0
        with pytest.raises(AssertionError, match="dec_12x16: the reference has shape"):
            golden.error(case, made[0])

    def test_the_folder_is_that_of_the_environment_or_the_nearest_above(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(ENVIRONMENT, raising=False)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(pytest.skip.Exception, match=f"this machine has no x.safetensors .*{ENVIRONMENT}"):
            golden_path("x.safetensors")
        beside = tmp_path / "shared" / "goldens"
        beside.mkdir(parents=True)
        (beside / "x.safetensors").touch()
        (tmp_path / "repository" / "deep").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "repository" / "deep")
        assert golden_path("x.safetensors") == beside / "x.safetensors"
        monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "elsewhere"))
        with pytest.raises(pytest.skip.Exception, match="elsewhere"):
            golden_path("x.safetensors")


class Overwrites(ToyImage):
    def _decode(self, z: Tensor) -> Tensor:
        return super()._decode(z.mul_(0.5))


class DrawsNoise(ToyImage):
    def _decode(self, z: Tensor) -> Tensor:
        return super()._decode(z) + 0 * torch.randn(1)


class MixesItems(ToyImage):
    def _decode(self, z: Tensor) -> Tensor:
        return super()._decode(z - z.mean(0))


class SeesTooLittle(ToyImage):
    """Its steps promise a halo of one where the block needs two."""

    def decode_steps(self) -> list[Step]:
        short = (Axis(before=1, after=2),) * 2
        return [replace(step, axes=short) if step.name == "block" else step for step in super().decode_steps()]


class ForgetsStatistics(ToyImage):
    """Its steps normalise every tile by itself."""

    def decode_steps(self) -> list[Step]:
        return [replace(step, norm=None) for step in super().decode_steps()]


class LiesAboutSizes(ToyImage):
    def _decode(self, z: Tensor) -> Tensor:
        return super()._decode(z)[..., :-1]


class RemembersOnItself(ToyImage):
    def _decode(self, z: Tensor) -> Tensor:
        self.last = super()._decode(z)
        return self.last


class StreamsThroughItself(ToyVideo):
    """One cache for all streams, on the model."""

    def _stream(self, direction: Direction, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        self.past = Past()
        for frame in itertools.chain.from_iterable(chunk.split(1, 2) for chunk in chunks):
            yield self.decoder(frame, self.past)


class LosesTheShift(ToyImage):
    def denormalize_latents(self, z: Tensor) -> Tensor:
        return super().denormalize_latents(z) + 0.01


class CutsTheGradient(ToyImage):
    def _encode(self, x: Tensor) -> Tensor:
        return super()._encode(x).detach()


class TestTheSuiteSeesWhatIsWrong:
    """Each of these families breaks one promise, and the test of that promise fails."""

    @pytest.mark.parametrize(
        ("broken", "test", "arguments"),
        [
            (Overwrites, "test_the_input_is_left_alone", {"direction": "decode"}),
            (DrawsNoise, "test_the_same_call_gives_the_same_result_and_draws_no_noise", {"direction": "decode"}),
            (MixesItems, "test_an_item_alone_is_the_item_in_a_batch", {"direction": "decode"}),
            (MixesItems, "test_sliced_equals_whole", {"direction": "decode"}),
            (SeesTooLittle, "test_tiled_equals_whole", {"direction": "decode"}),
            (SeesTooLittle, "test_tiled_equals_whole_at_the_extremes", {"direction": "decode"}),
            (ForgetsStatistics, "test_every_grid_can_be_tiled", {"direction": "decode"}),
            (LiesAboutSizes, "test_shapes_are_those_that_were_promised", {}),
            (RemembersOnItself, "test_a_stream_that_is_dropped_leaves_nothing_behind", {}),
            (RemembersOnItself, "test_an_exception_leaves_nothing_behind", {"direction": "decode", "tiled": False}),
            (StreamsThroughItself, "test_streams_at_the_same_time_do_not_see_each_other", {}),
            (LosesTheShift, "test_normalisation_has_an_inverse", {}),
            (CutsTheGradient, "test_gradients_reach_every_parameter_and_the_input", {}),
        ],
        ids=lambda value: value.__name__ if isinstance(value, type) else "",
    )
    def test_it_fails(self, broken: type[Toy], test: str, arguments: dict[str, Any]) -> None:
        class Suite(ConformanceSuite):
            latent_grids = ((1,) * len(toy(broken).sample_axes), (3, 5, 4)[-len(toy(broken).sample_axes) :])
            stream_axis = 2 if issubclass(broken, ToyVideo) else 0

            def tiny(self) -> Toy:
                return toy(broken)

        method = getattr(Suite(), test)
        models = {"vae": toy(broken).requires_grad_(False), "vae64": toy(broken).requires_grad_(False).double()}
        fixtures = {name: models[name] for name in inspect.signature(method).parameters if name in models}
        with pytest.raises(AssertionError):
            method(**fixtures, **arguments)


class ToySuite(VideoMiniatureSuite):
    """A miniature whose clip is noise."""

    model = ToyVideo
    least_psnr = 26.0
    at: ClassVar[Path]

    @classmethod
    def folder(cls) -> Path:
        return cls.at

    @classmethod
    def example(cls) -> Path:
        return cls.at / "clip.mp4"

    @classmethod
    def load(cls) -> Toy:
        return toy(ToyVideo)

    @classmethod
    def read(cls, frames: int) -> Tensor:
        return make_input("clip", (1, 2, 5, 8, 12), "video")


class TestTheSuiteOfMiniaturesSeesWhatIsWrong:
    @pytest.fixture
    def suite(self, tmp_path: Path) -> ToySuite:
        """All that it asks of files is true."""

        class Suite(ToySuite):
            at = tmp_path

        for name in ("config.json", "diffusion_pytorch_model.safetensors", "clip.mp4"):
            (tmp_path / name).touch()
        suite = Suite()
        x = suite.read(9)
        row = f"| bunny | 5 × 12 × 8 | {float(psnr(x, suite.load()(x))):.2f} | 0.9 |\n"
        (tmp_path / "README.md").write_text(row, encoding="utf-8")
        return suite

    def test_it_passes_what_is_right(self, suite: ToySuite) -> None:
        suite.test_it_is_small()
        suite.test_the_readme_states_what_the_files_give(suite.load())
        z = make_input("latents", (1, 3, 4, 32, 32), "latent")
        suite.test_normalised_latents_are_standard(suite.load(), suite.load().denormalize_latents(z))

    @pytest.mark.parametrize(
        ("name", "size"),
        [
            ("diffusion_pytorch_model.safetensors", 3_000_001),
            ("clip.mp4", 300_001),
            ("weights.pt", 1),
            ("README.md", None),
        ],
    )
    def test_files(self, suite: ToySuite, name: str, size: int | None) -> None:
        path = suite.folder() / name
        if size is None:
            path.unlink()
        else:
            path.write_bytes(bytes(size))
        with pytest.raises(AssertionError):
            suite.test_it_is_small()

    def test_a_clip_that_does_not_come_back(self, suite: ToySuite) -> None:
        vae, x = suite.load(), suite.read(9)
        with pytest.raises(AssertionError):
            suite.test_the_clip_comes_back(vae, x, vae.encode(x).latent_dist.mode())

    @pytest.mark.parametrize("row", ["| bunny | 5 × 12 × 8 | 99.00 | 0.9 |", "| bunny | 5 × 12 × 9 | 9.00 | 0.9 |", ""])
    def test_a_readme_that_states_something_else(self, suite: ToySuite, row: str) -> None:
        (suite.folder() / "README.md").write_text(row, encoding="utf-8")
        with pytest.raises(AssertionError):
            suite.test_the_readme_states_what_the_files_give(suite.load())

    @pytest.mark.parametrize(("gain", "shift"), [(3.0, 0.0), (0.1, 0.0), (1.0, 1.0)])
    def test_latents_that_are_not_standard(self, suite: ToySuite, gain: float, shift: float) -> None:
        z = make_input("latents", (1, 3, 4, 32, 32), "latent") * gain + shift
        with pytest.raises(AssertionError):
            suite.test_normalised_latents_are_standard(suite.load(), suite.load().denormalize_latents(z))


class TestRules:
    @pytest.mark.parametrize(
        ("key", "shape", "deviation", "mean"),
        [
            ("conv.weight", (64, 32, 3, 3), 1 / math.sqrt(32 * 9), 0.0),
            ("norm.weight", (4096,), 0.1, 1.0),
            ("conv.bias", (4096,), 0.05, 0.0),
            ("conv.weight_v", (64, 64), 1.0, 0.0),
            ("snake.alpha", (1, 4096, 1), 0.1, 0.0),
        ],
    )
    def test_a_tensor_has_the_spread_of_its_rule(
        self, key: str, shape: tuple[int, ...], deviation: float, mean: float
    ) -> None:
        x = make_tensor(key, shape)
        assert x.shape == shape
        assert float(x.std()) == pytest.approx(deviation, rel=0.05)
        assert float(x.mean()) == pytest.approx(mean, abs=4 * deviation / math.sqrt(x.numel()))

    def test_names_and_salt_make_other_numbers(self) -> None:
        one = make_tensor("a.weight", (4, 4))
        assert torch.equal(one, make_tensor("a.weight", (4, 4)))
        assert not torch.equal(one, make_tensor("b.weight", (4, 4)))
        assert not torch.equal(one, make_tensor("a.weight", (4, 4), salt="s"))

    def test_a_model_is_filled_by_the_names_of_its_tensors(self) -> None:
        model = fill(nn.Sequential(nn.Linear(4, 4)), gains={"*.weight": 3.0})
        assert torch.equal(model[0].weight, 3 * make_tensor("0.weight", (4, 4)))
        assert torch.equal(model[0].bias, make_tensor("0.bias", (4,)))

    @pytest.mark.parametrize("kind", ["image", "video", "audio", "gated", "latent", "mel"])
    def test_inputs_have_the_range_of_their_kind(self, kind: str) -> None:
        x = make_input("any", (1, 2, 5, 16, 16) if kind == "video" else (1, 2, 64, 64), kind)  # type: ignore[arg-type]
        assert x.dtype == torch.float32
        if kind in ("image", "video", "audio", "gated"):
            assert float(x.abs().max()) <= 1
        with pytest.raises(ValueError, match="must be one of"):
            make_input("any", (1, 2), "smell")  # type: ignore[arg-type]
