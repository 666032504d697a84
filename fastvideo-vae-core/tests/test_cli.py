"""The command line, run as a person would run it, on a toy family of pictures."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastvideo_vae_core as fvae
from fastvideo_vae_core import registry
from fastvideo_vae_core.cli import codec, console, roundtrip
from fastvideo_vae_core.config import VAEConfig
from fastvideo_vae_core.family import Component, Evidence, Family, Inferred, Layout
from fastvideo_vae_core.latents import LatentFile, Provenance, read_latents, write_latents
from fastvideo_vae_core.media import read_image, write_image
from fastvideo_vae_core.testing import toys
from fastvideo_vae_core.testing.command import Command, Ran
from fastvideo_vae_core.testing.golden import fill
from fastvideo_vae_core.testing.plugins import installed

HEIGHT, WIDTH = 45, 62
# Entry points take no hyphen, which the name that pytest gives this module has.
MODULE = "toy_pictures"


class Picture(toys.ToyImage):
    """The toy of pictures, with the three channels that picture files have."""

    family = "picture"

    @property
    def channels(self) -> tuple[int, int]:
        return 3, self.arch.latent_channels

    def encoder_of(self, width: int, latents: int) -> toys.Half:
        encoder = toys.ImageEncoder(width, latents)
        encoder.conv_in = nn.Conv2d(3, width, 3, stride=2)
        return encoder

    def decoder_of(self, width: int, latents: int) -> toys.Half:
        decoder = toys.ImageDecoder(width, latents)
        decoder.conv_out = nn.Conv2d(width, 3, 3, padding=1)
        return decoder


DAY = toys.ToyArchConfig(width=4)
NIGHT = toys.ToyArchConfig(width=4, scaling_factor=0.25)


def infer(evidence: Evidence) -> Inferred:
    inferred = toys.infer(evidence)
    return Inferred(arch=DAY, variants=("day", "night")) if inferred.arch == DAY else inferred


FAMILY = Family(
    name="picture",
    distribution="fastvideo-vae-core",
    title="image: a toy",
    components=(
        Component(
            media="image",
            model=f"{MODULE}:Picture",
            arch="fastvideo_vae_core.testing.toys:ToyArchConfig",
            class_names=("Picture",),
            variants={"day": f"{MODULE}:DAY", "night": f"{MODULE}:NIGHT"},
            layouts=(
                Layout(name="diffusers", markers=(("encoder.conv_in.weight", 4), ("decoder.conv_out.weight", 4))),
            ),
            infer=f"{MODULE}:infer",
        ),
    ),
    demo="demo",
    demo_media="demo/photograph.png",
)
POINT = EntryPoint(name="picture", group=registry.GROUP, value=f"{MODULE}:FAMILY")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in with a photograph, weights, and the family whose demonstration they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, MODULE, sys.modules[__name__])
    save_model(tmp_path / "demo", arch=DAY)
    y, x = torch.meshgrid(torch.linspace(-1, 1, HEIGHT), torch.linspace(-1, 1, WIDTH), indexing="ij")
    write_image(tmp_path / "photo.png", torch.stack([x, y, torch.sin(9 * x * y)]))
    write_image(tmp_path / "demo" / "photograph.png", torch.stack([x, y, torch.sin(9 * x * y)]))
    monkeypatch.setattr(Family, "resource", lambda self, name: tmp_path / name)
    with installed(POINT):
        yield tmp_path


def save_model(
    folder: Path, arch: toys.ToyArchConfig = DAY, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Path:
    """Weights in diffusers' layout; `scale` multiplies those of the encoder's last layer."""
    made = Picture(VAEConfig(arch_config=arch))
    fill(made)
    tensors = {name: tensor.detach().to(dtype) for name, tensor in made.state_dict().items()}
    tensors["encoder.conv_out.weight"] = tensors["encoder.conv_out.weight"] * scale
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "Picture", **arch.to_dict()}))
    return folder


def assert_fails(ran: Ran, *words: str, code: int = 2) -> None:
    ran.assert_fails(*words, code=code)


# -------------------------------------------------------------------- encode and decode


def test_what_is_encoded_is_decoded_to_the_same_size(run: Command, desk: Path) -> None:
    encoded = run("encode", "photo.png", "-o", "photo.safetensors", "--model", "demo")
    assert encoded.code == 0
    assert "45 x 62 is padded to 46 x 62" in encoded.err
    assert "photo.png -> photo.safetensors" in encoded.out
    file = read_latents("photo.safetensors")
    assert (file.space, file.sample_shape, file.latents.shape) == ("raw", (1, 3, HEIGHT, WIDTH), (1, 4, 23, 31))

    decoded = run("decode", "photo.safetensors", "-o", "back.png", "--model", "demo")
    assert (decoded.code, decoded.err) == (0, "")
    vae = fvae.load("demo")
    expected = vae.crop_to(vae.decode(file.latents).sample, file.sample_shape)[0].clamp(-1, 1)
    # Half a level of 8 bits.
    assert (read_image("back.png") - expected).abs().max() <= 1 / 255 + 1e-6


def test_normalized_latents_are_what_the_diffusion_model_sees(run: Command, desk: Path) -> None:
    run("encode", "photo.png", "-o", "raw.safetensors", "--model", "demo")
    run("encode", "photo.png", "-o", "normalized.safetensors", "--model", "demo", "--normalized")
    raw, normalized = read_latents("raw.safetensors"), read_latents("normalized.safetensors")
    assert normalized.space == "normalized"
    torch.testing.assert_close(normalized.latents, fvae.load("demo").normalize_latents(raw.latents))
    for name in ("raw", "normalized"):
        assert run("decode", f"{name}.safetensors", "-o", f"{name}.png", "--model", "demo").code == 0
    torch.testing.assert_close(read_image("raw.png"), read_image("normalized.png"), rtol=0, atol=2 / 255)


def test_several_inputs_go_into_a_folder(run: Command, desk: Path) -> None:
    (desk / "other.png").write_bytes((desk / "photo.png").read_bytes())
    assert run("encode", "photo.png", "other.png", "-o", "latents", "--model", "demo").code == 0
    assert sorted(path.name for path in (desk / "latents").iterdir()) == ["other.safetensors", "photo.safetensors"]
    assert run("decode", *sorted((desk / "latents").iterdir()), "-o", "back", "--model", "demo").code == 0
    assert sorted(path.name for path in (desk / "back").iterdir()) == ["other.png", "photo.png"]


def test_two_inputs_of_one_name_are_refused(run: Command, desk: Path) -> None:
    (desk / "inside").mkdir()
    (desk / "inside" / "photo.png").write_bytes((desk / "photo.png").read_bytes())
    assert_fails(run("encode", "photo.png", "inside/photo.png", "-o", "latents"), "would both become")


def test_without_a_model_the_miniature_is_used_and_named(run: Command) -> None:
    encoded = run("encode", "photo.png", "-o", "photo.safetensors")
    assert encoded.code == 0
    assert "miniature that ships with fastvideo-vae-core; --model takes a real checkpoint" in encoded.err
    assert run("decode", "photo.safetensors", "-o", "back.png").code == 0
    assert run("encode", "photo.png", "-o", "photo.safetensors", "--quiet").err == ""


def test_a_sample_is_as_random_as_its_seed(run: Command) -> None:
    for name, arguments in {"mode": [], "one": ["--sample"], "two": ["--sample", "--seed", "1"]}.items():
        run("encode", "photo.png", "-o", f"{name}.safetensors", *arguments)
    run("encode", "photo.png", "-o", "again.safetensors", "--sample", "--seed", "0")
    latents = {name: read_latents(f"{name}.safetensors").latents for name in ("mode", "one", "two", "again")}
    assert torch.equal(latents["one"], latents["again"])
    assert not torch.equal(latents["one"], latents["two"])
    assert not torch.equal(latents["one"], latents["mode"])


@pytest.mark.parametrize("arguments", [["--tiling"], ["--tile", "8", "12"]], ids=" ".join)
def test_tiles_show_in_the_plan_and_not_in_the_result(run: Command, arguments: list[str]) -> None:
    write_image("small.png", read_image("photo.png")[:, :20, :28])
    encode = ("encode", "small.png", "--plan", "-o")
    [whole] = run(*encode, "whole.safetensors", "--json").json["files"]
    tiled = run(*encode, "tiled.safetensors", *arguments)
    assert whole["plan"]["mode"] == "whole"
    assert "mode    tiled, tiles of" in tiled.out
    # fp32 sums in another order.
    torch.testing.assert_close(
        read_latents("tiled.safetensors").latents, read_latents("whole.safetensors").latents, rtol=0, atol=1e-5
    )


def test_a_budget_chooses_the_plan_or_is_refused(run: Command) -> None:
    chosen = run("encode", "photo.png", "-o", "photo.safetensors", "--plan", "--memory-budget", "1GiB")
    assert "chosen for a budget of 1.00 GiB" in chosen.out
    starved = run("encode", "photo.png", "-o", "photo.safetensors", "-q", "--memory-budget", "1KB")
    assert_fails(starved, "or more, the budget is")
    assert_fails(run("encode", "photo.png", "-o", "photo.safetensors", "-q", "--memory-budget", "lots"), "6GiB")


def test_float16_that_overflows_is_computed_again_and_said_in_one_line(run: Command, desk: Path) -> None:
    save_model(desk / "hot", dtype=torch.float16, scale=3e4)
    arguments = ("encode", "photo.png", "-o", "photo.safetensors", "-q", "--model", "hot", "--fp16")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        retried = run(*arguments, "retry")
    assert retried.code == 0
    [warning] = retried.err.splitlines()
    assert warning.startswith("fastvideo-vae: warning: encode of (1, 3, 46, 62) overflowed in float16")
    assert "--fp16 upcast skips" in warning
    assert run(*arguments, "upcast").err == ""


# -------------------------------------------------------------------- provenance


def test_latents_of_another_checkpoint_are_refused_unless_forced(run: Command, desk: Path) -> None:
    save_model(desk / "other", scale=2.0)
    run("encode", "photo.png", "-o", "photo.safetensors", "--model", "other")
    wrong = ("decode", "photo.safetensors", "-o", "back.png", "-q")
    assert_fails(run(*wrong), "were made by checkpoint", "--force", "pass their checkpoint as --model")
    assert not (desk / "back.png").exists()
    forced = run(*wrong[:-1], "--model", "demo", "--force")
    assert forced.code == 0
    assert "because of --force" in forced.err


def test_latents_that_were_resized_are_not_cut_without_a_word(run: Command, desk: Path) -> None:
    run("encode", "photo.png", "-o", "photo.safetensors")
    file = read_latents("photo.safetensors")
    write_latents(
        "large.safetensors",
        LatentFile(
            latents=file.latents.repeat(1, 1, 2, 2),
            provenance=file.provenance,
            space="raw",
            sample_shape=file.sample_shape,
        ),
    )
    assert_fails(run("decode", "large.safetensors", "-o", "back.png", "-q"), "decodes to 92 x 124", "45 x 62")
    assert run("decode", "large.safetensors", "-o", "back.png", "-q", "--force").code == 0
    assert read_image("back.png").shape == (3, 92, 124)


def test_the_variant_of_the_latents_settles_which_one_a_bare_file_is(run: Command, desk: Path) -> None:
    bare = (desk / "demo" / "diffusion_pytorch_model.safetensors").rename(desk / "bare.safetensors")
    encode = ("encode", "photo.png", "-o", "photo.safetensors", "-q", "--normalized", "--model", bare)
    assert_fails(run(*encode), "pass --variant day or --variant night")
    assert run(*encode, "--variant", "night").code == 0
    decoded = run("decode", "photo.safetensors", "-o", "back.png", "--model", bare, "--json")
    assert decoded.json["model"]["variant"] == "night"


def test_latents_of_a_family_that_is_not_installed_name_the_package(run: Command) -> None:
    write_latents(
        "wan.safetensors",
        LatentFile(
            latents=torch.zeros(1, 16, 1, 4, 4),
            provenance=Provenance(family="wan", checkpoint="0"),
            space="raw",
            sample_shape=(1, 3, 1, 32, 32),
        ),
    )
    assert_fails(run("decode", "wan.safetensors", "-o", "back.mp4"), "pip install fastvideo-vae-wan")


def test_a_batch_in_one_file_is_refused(run: Command) -> None:
    provenance = Provenance(family="picture", checkpoint="0")
    file = LatentFile(latents=torch.zeros(2, 4, 4, 4), provenance=provenance, space="raw", sample_shape=(2, 3, 8, 8))
    write_latents("two.safetensors", file)
    assert_fails(run("decode", "two.safetensors", "-o", "back.png"), "a batch of 2")


# -------------------------------------------------------------------- roundtrip and demo


def test_a_round_trip_writes_both_pictures_and_measures(run: Command, desk: Path) -> None:
    ran = run("roundtrip", "photo.png", "-o", "back.png", "--model", "demo")
    assert ran.code == 0
    for word in ("4 x 23 x 31", "2.93 times fewer", "PSNR", "SSIM", "back.png", "back-comparison.png"):
        assert word in ran.out
    assert read_image("back.png").shape == (3, HEIGHT, WIDTH)
    assert read_image("back-comparison.png").shape[0] == 3


def test_a_round_trip_in_json(run: Command) -> None:
    document = run("roundtrip", "photo.png", "-o", "back.png", "--model", "demo", "--json", "--plan").json
    assert document["latent_shape"] == [1, 4, 23, 31]
    assert document["padded_shape"] == [1, 3, 46, 62]
    # Too small for the five scales of MS-SSIM.
    assert set(document["metrics"]) == {"psnr", "ssim"}
    assert document["plan"]["decode"]["mode"] == "whole"
    assert document["model"]["family"] == "picture"


def test_the_demo_writes_three_pictures_and_says_which_to_open(run: Command, desk: Path) -> None:
    ran = run("demo")
    assert (ran.code, ran.err) == (0, "")
    names = ["comparison.png", "original.png", "reconstruction.png"]
    assert sorted(path.name for path in (desk / "demo-output").iterdir()) == names
    assert str(Path("demo-output", "comparison.png")) in ran.out
    torch.testing.assert_close(read_image("demo-output/original.png"), read_image("photo.png"))
    assert run("demo", "--family", "picture", "--output", "elsewhere", "--json").json["metrics"]["psnr"] > 0


def test_no_family_no_demo(run: Command) -> None:
    with installed():
        assert_fails(run("demo"), "pip install")
        assert_fails(run("encode", "photo.png", "-o", "x.safetensors"), "no installed family")
    with installed(*toys.POINTS):
        assert_fails(run("demo", "--family", "toy_image"), "ships no demonstration")


@pytest.mark.parametrize("medium", ["image", "audio", pytest.param("video", marks=pytest.mark.slow)])
def test_the_demonstration_of_every_installed_family(desk: Path, medium: str) -> None:
    """Those of video take half a minute; the test of the wheels runs them, too."""
    for family in json.loads(python("-m", "fastvideo_vae_core", "families", "--json")):
        if family["demo"] and family["components"][0]["media"] == medium:
            name = family["name"]
            demo = python("-m", "fastvideo_vae_core", "demo", "--family", name, "--output", name, "--json")
            # What a miniature must reach on media that it has not seen; LTX-2's was trained for seven minutes only.
            metrics = json.loads(demo)["metrics"]
            assert metrics.get("psnr", -1) >= (25 if name == "ltx2" else 28) or metrics.get("si_sdr", -1) >= 8
            assert all(path.stat().st_size for path in (desk / name).iterdir())


# -------------------------------------------------------------------- inspect, families, doctor


def test_inspect_tells_what_a_checkpoint_would_be_loaded_as(run: Command) -> None:
    ran = run("inspect", "demo")
    assert (ran.code, ran.err) == (0, "")
    for word in ("class    Picture", "picture, component vae", "layout    diffusers", "day", "float32", "Picture: "):
        assert word in ran.out
    document = run("inspect", "demo", "--json").json
    assert (document["kind"], document["problem"]) == ("checkpoint", None)
    assert document["components"][0]["arch"]["width"] == 4


def test_inspect_says_which_variant_to_pass(run: Command, desk: Path) -> None:
    bare = (desk / "demo" / "diffusion_pytorch_model.safetensors").rename(desk / "bare.safetensors")
    ran = run("inspect", bare)
    assert ran.code == 0
    assert "--variant day or --variant night" in ran.out


def test_inspect_knows_latents(run: Command) -> None:
    run("encode", "photo.png", "-o", "photo.safetensors")
    ran = run("inspect", "photo.safetensors")
    assert ran.code == 0
    for word in ("latent file", "1 x 4 x 23 x 31, float32, raw", "1 x 3 x 45 x 62", "picture"):
        assert word in ran.out
    document = run("inspect", "photo.safetensors", "--json").json
    assert (document["kind"], document["provenance"]["family"]) == ("latents", "picture")


def test_inspect_of_something_else_exits_with_1(run: Command, desk: Path) -> None:
    save_file({"weight": torch.zeros(2)}, desk / "other.safetensors")
    ran = run("inspect", "other.safetensors")
    assert ran.code == 1
    assert "no network of an installed family (picture)" in ran.out


def test_families_lists_the_installed_the_broken_and_the_missing(run: Command) -> None:
    broken = EntryPoint(name="broken", group=registry.GROUP, value="no_such_module:FAMILY")
    with installed(POINT, broken):
        ran = run("families")
        document = run("families", "--json").json
    assert ran.code == 0
    for word in (
        "picture",
        "image: a toy",
        "day, night",
        "No module named 'no_such_module'",
        "pip install fastvideo-vae-wan",
    ):
        assert word in ran.out
    assert {entry["name"]: entry["status"] for entry in document} == {"picture": "installed", "broken": "broken"}


def test_a_name_claimed_twice_is_broken_and_takes_nobody_else_down(run: Command) -> None:
    twice = EntryPoint(name="picture", group=registry.GROUP, value="somebody_else:FAMILY")
    with installed(POINT, twice, *toys.POINTS):
        ran = run("families")
        assert "'picture' is claimed by" in ran.out
        assert "toy_image" in ran.out
        assert_fails(run("encode", "photo.png", "-o", "x.safetensors", "-q", "--family", "picture"), "is claimed by")


def test_the_doctor_finds_this_machine_well(run: Command) -> None:
    ran = run("doctor")
    assert ran.code == 0, ran.out
    for word in (torch.__version__, "python", "picture", "All is well."):
        assert word in ran.out
    assert run("doctor", "--json").json["healthy"] is True


def test_the_doctor_names_what_is_wrong(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    broken = EntryPoint(name="broken", group=registry.GROUP, value="no_such_module:FAMILY")
    with installed(broken):
        ran = run("doctor")
    assert ran.code == 1
    for word in (
        "past cuDNN",
        "install torch 2.11 or newer",
        "no_such_module",
        'pip install "fastvideo-vae-core[report]"',
    ):
        assert word in ran.out
    assert "2 to mend." in ran.out


# -------------------------------------------------------------------- bad input: one line, and nothing half-written


def encode(run: Command, *arguments: str | Path) -> Ran:
    """Encode the photograph quietly; the arguments may name another model."""
    return run("encode", "photo.png", "-o", "photo.safetensors", "-q", *arguments)


def test_not_an_image(run: Command, desk: Path) -> None:
    (desk / "text.png").write_text("no picture")
    (desk / "text.txt").write_text("no picture")
    (desk / "empty.png").touch()
    assert_fails(run("encode", "text.png", "-o", "x.safetensors", "-q"), "text.png is not an image")
    assert_fails(run("encode", "text.txt", "-o", "x.safetensors"), "names no known media")
    assert_fails(run("encode", "empty.png", "-o", "x.safetensors"), "empty.png is empty")
    assert_fails(run("encode", "gone.png", "-o", "x.safetensors"), "cannot read gone.png")
    assert_fails(run("roundtrip", "text.png", "-o", "x.png", "-q"), "text.png is not an image")
    assert not [*desk.glob("x*")]


def test_media_of_another_kind(run: Command, desk: Path) -> None:
    (desk / "clip.mp4").write_bytes(b"0")
    assert_fails(run("encode", "clip.mp4", "-o", "x.safetensors"), "no installed family ships a miniature for video")
    assert_fails(run("encode", "clip.mp4", "photo.png", "-o", "x"), "one kind of media")
    with installed(*toys.POINTS):
        save_toy_video(desk / "video.safetensors")
        assert_fails(encode(run, "--model", "video.safetensors"), "is a model of video (toy_video), the input is image")


def test_options_of_other_media_are_refused(run: Command) -> None:
    assert_fails(encode(run, "--downmix"), "--downmix is for audio, this is image")
    assert_fails(run("roundtrip", "photo.png", "-o", "x.png", "--crf", "0"), "--crf is for video, this is image")
    assert_fails(run("roundtrip", "photo.png", "-o", "x.png", "--no-sound"), "--no-sound is for video, this is image")


def save_toy_video(path: Path) -> None:
    save_file(toys.toy(toys.ToyVideo).state_dict(), path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"", ["is empty; download it again"]),
        (lambda data: data[: len(data) // 2], ["is no whole safetensors file"]),
    ],
    ids=["empty", "truncated"],
)
def test_a_damaged_weight_file(run: Command, desk: Path, damage: Callable[[bytes], bytes], words: list[str]) -> None:
    path = desk / "demo" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert_fails(encode(run, "--model", "demo"), *words)
    assert_fails(run("inspect", "demo"), *words)


def test_a_monstrous_config_is_refused_before_anything_is_allocated(run: Command, desk: Path) -> None:
    config = desk / "demo" / "config.json"
    config.write_text(json.dumps({"_class_name": "Picture", "width": 10**9}))
    assert_fails(encode(run, "--model", "demo"), "ToyArchConfig.width must lie in [2, 64], got 1000000000")
    assert_fails(encode(run, "--model", "demo", "--config", config), "must lie in")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("encoder.block.conv.weight"), "1 missing: encoder.block.conv.weight"),
        (lambda tensors: tensors.update({"encoder.extra": torch.zeros(1)}), "1 unexpected: encoder.extra"),
        (
            lambda tensors: tensors.update({"encoder.block.conv.bias": torch.zeros(3)}),
            "1 misshapen: encoder.block.conv",
        ),
        (lambda tensors: tensors["encoder.block.conv.bias"].fill_(torch.nan), "1 tensors hold NaN or infinity"),
    ],
    ids=["missing", "extra", "misshapen", "nan"],
)
def test_tensors_that_do_not_fit(
    run: Command, desk: Path, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    path = desk / "demo" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    assert_fails(encode(run, "--model", "demo"), words)
    assert not (desk / "photo.safetensors").exists()


def test_an_unknown_class(run: Command, desk: Path) -> None:
    config = desk / "demo" / "config.json"
    config.write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    assert_fails(encode(run, "--model", "demo"), "pip install fastvideo-vae-wan")
    inspected = run("inspect", "demo")
    assert inspected.code == 1
    assert "pip install fastvideo-vae-wan" in inspected.out
    config.write_text(json.dumps({"_class_name": "Nobody"}))
    assert_fails(encode(run, "--model", "demo"), "no installed family answers to 'Nobody'")


def test_an_illegal_size_is_refused_where_padding_is_not_wanted(run: Command) -> None:
    assert_fails(encode(run, "--no-pad"), "got 45 x 62; pass 44 x 62 or 46 x 62", "or leave out --no-pad")


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    run: Command, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (codec, roundtrip):
        monkeypatch.setattr(module, "open_model", pytest.fail)
    (desk / "folder.png").mkdir()
    save_latents(desk / "x.safetensors")
    assert_fails(run("encode", "photo.png", "-o", "no/such/x.safetensors"), "no/such does not exist")
    assert_fails(run("encode", "photo.png", "-o", "photo.png/"), "cannot create the folder photo.png")
    assert_fails(run("encode", "photo.png", "-o", "photo.latents"), "must end in .safetensors")
    assert_fails(run("decode", "x.safetensors", "-o", "back.gif"), "must end in .png or")
    assert_fails(run("decode", "photo.png", "-o", "back.png"), "cannot be read as latents")
    assert_fails(run("roundtrip", "photo.png", "-o", "photo.png"), "photo.png is the input")
    assert_fails(run("roundtrip", "photo.png", "-o", "no/x.png"), "no does not exist")
    assert_fails(run("demo", "-o", "photo.png"), "cannot create the folder photo.png")


def save_latents(path: Path) -> None:
    provenance = Provenance(family="picture", checkpoint="0")
    file = LatentFile(latents=torch.zeros(1, 4, 4, 4), provenance=provenance, space="raw", sample_shape=(1, 3, 8, 8))
    write_latents(path, file)


def test_a_device_that_is_not_there(run: Command) -> None:
    assert_fails(encode(run, "--device", "cuda:77"), "device 'cuda:77' cannot be used")
    assert_fails(encode(run, "--device", "abacus"), "device 'abacus' cannot be used")


def test_out_of_memory_names_the_way_out(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = Picture._encode

    def full(self: Picture, x: torch.Tensor) -> torch.Tensor:
        # Plans predict on shapes alone, which take no memory.
        if not x.is_meta:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return encoded(self, x)

    monkeypatch.setattr(Picture, "_encode", full)
    assert_fails(encode(run), "encode of (1, 3, 46, 62) ran out of memory", "no smaller plan; pass --memory-budget")


# -------------------------------------------------------------------- the frame around the commands


@pytest.mark.parametrize(
    "arguments", [["encode", "photo.png"], ["nonsense"], ["encode", "x.png", "-o", "y", "--tile", "0", "1"]]
)
def test_wrong_usage_is_one_line(run: Command, arguments: list[str]) -> None:
    assert_fails(run(*arguments), "fastvideo-vae: error: ", "--help`")


def test_no_command_shows_the_help(run: Command) -> None:
    ran = run()
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("usage: fastvideo-vae")
    assert run("--help").code == 0
    assert run("--version").out.startswith("fastvideo-vae 0.")


def test_debug_shows_the_traceback(run: Command) -> None:
    ran = encode(run, "--no-pad", "--debug")
    assert ran.code == 2
    assert ran.err.startswith("Traceback")
    assert "ShapeError" in ran.err


def test_the_unexpected_is_one_line_too(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the floor\nopened")

    monkeypatch.setattr(Picture, "_encode", fail)
    assert_fails(encode(run), "unexpected RuntimeError: the floor opened (--debug shows where)", code=1)


def test_an_interrupt_leaves_nothing(run: Command, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Picture, "_encode", interrupt)
    assert_fails(encode(run), "interrupted", code=130)
    assert not (desk / "photo.safetensors").exists()


def test_a_bar_shows_only_to_somebody_who_watches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bar(**settings: bool) -> str:
        assert list(console.Console(**{"json": False, "quiet": False, **settings}).progress([1, 2], "encode")) == [1, 2]
        return capsys.readouterr().err

    assert bar() == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "encode" in bar()
    assert bar(json=True) == bar(quiet=True) == ""


def test_a_bar_shows_the_units_of_a_call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def bar(**settings: bool) -> str:
        shown = console.Console(**{"json": False, "quiet": False, **settings})
        with shown.units("decode") as progress:
            # The second attempt has more of them.
            for units in ((0, 1), (0, 3), (1, 3), (2, 3), (3, 3)):
                progress(*units)
        return capsys.readouterr().err

    assert bar() == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    assert "decode" in bar()
    assert bar(json=True) == bar(quiet=True) == ""


def test_help_and_families_import_no_torch() -> None:
    code = "import sys; from fastvideo_vae_core.cli.__main__ import main; {}; assert 'torch' not in sys.modules"
    for command in ("main(['--help'])", "main(['encode', '--help'])", "main(['families'])"):
        python("-c", code.format(command))


def python(*arguments: str) -> str:
    """What a new interpreter prints; it must end well."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
