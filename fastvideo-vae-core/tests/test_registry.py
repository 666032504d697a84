"""The registry is lazy, cached and loud."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastvideo_vae_core import registry
from fastvideo_vae_core.errors import FamilyError
from fastvideo_vae_core.testing.plugins import installed
from fastvideo_vae_core.testing.toys import POINTS

FAMILY_SOURCE = """
from fastvideo_vae_core.family import Component, Family
FAMILY = Family(
    name={name!r}, distribution={distribution!r}, title="", components=(
        Component(
            media="image", model="x:X", arch="x:X", class_names={class_names!r}, variants={{}}, layouts=(), infer="x:x"
        ),
    ),
)
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules can be imported, and are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def write_family(folder: Path, module: str, name: str, distribution: str, *class_names: str) -> EntryPoint:
    source = FAMILY_SOURCE.format(name=name, distribution=distribution, class_names=class_names)
    (folder / f"{module}.py").write_text(source)
    return point(name, f"{module}:FAMILY", distribution)


def point(name: str, value: str, distribution: str) -> EntryPoint:
    return EntryPoint(name=name, group=registry.GROUP, value=value)._for(SimpleNamespace(name=distribution))


def test_listing_names_imports_nothing(plugins: Path) -> None:
    with installed(point("b", "absent_module:FAMILY", "dist-b"), point("a", "absent_module:FAMILY", "dist-a")):
        assert registry.families() == ("a", "b")


def test_a_family_is_found_by_its_name_and_by_its_class_names(plugins: Path) -> None:
    with installed(write_family(plugins, "plug", "plug", "dist-plug", "AutoencoderPlug", "PlugVAE")):
        assert {registry.resolve(name).name for name in ("plug", "AutoencoderPlug", "PlugVAE")} == {"plug"}
        assert registry.resolve("plug") is registry.resolve("PlugVAE")


def test_resolving_a_name_imports_that_family_alone(plugins: Path) -> None:
    one, other = (write_family(plugins, f"plug_{name}", name, f"dist-{name}") for name in "ab")
    with installed(one, other):
        registry.resolve("a")
        assert "plug_a" in sys.modules
        assert "plug_b" not in sys.modules


def test_a_name_claimed_twice_names_both_distributions(plugins: Path) -> None:
    one = write_family(plugins, "plug_a", "same", "dist-a")
    other = write_family(plugins, "plug_b", "same", "dist-b")
    with installed(one, other, *POINTS):
        for ask in (registry.families, lambda: registry.resolve("same")):
            with pytest.raises(FamilyError, match="'same' is claimed by dist-a and dist-b"):
                ask()
        assert registry.resolve("toy_image").name == "toy_image"
        assert "same" not in registry.installed()
        assert "dist-a and dist-b" in registry.failures()["same"]


def test_a_class_name_claimed_twice_names_both_distributions(plugins: Path) -> None:
    one = write_family(plugins, "plug_a", "a", "dist-a", "SameVAE")
    other = write_family(plugins, "plug_b", "b", "dist-b", "SameVAE")
    with installed(one, other), pytest.raises(FamilyError, match="'SameVAE' is claimed by dist-a and dist-b"):
        registry.resolve("SameVAE")


def test_an_editable_install_beside_a_wheel_is_one_family(plugins: Path) -> None:
    one = write_family(plugins, "plug", "plug", "dist-plug")
    with installed(one, point("plug", "plug:FAMILY", "dist-plug")):
        assert registry.families() == ("plug",)
        assert registry.resolve("plug").name == "plug"


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("import a_module_that_is_absent", "ModuleNotFoundError"),
        ("def", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("assert False", "AssertionError"),
        ("", "AttributeError"),
        ("FAMILY = 5", "must be a Family, got int"),
    ],
)
def test_a_plugin_that_fails_is_reported_and_takes_nobody_down(plugins: Path, source: str, cause: str) -> None:
    (plugins / "broken.py").write_text(source)
    with installed(point("broken", "broken:FAMILY", "dist-broken"), *POINTS):
        assert "broken" in registry.families()
        with pytest.raises(FamilyError, match=f"dist-broken.*{cause}"):
            registry.resolve("broken")
        assert cause in registry.failures()["broken"]
        assert set(registry.installed()) == {"toy_image", "toy_video", "toy_audio"}
        assert registry.resolve("ToyVideo").name == "toy_video"
        with pytest.raises(FamilyError, match=cause):
            registry.resolve("ClassThatNobodyKnows")


def test_an_interrupted_import_is_not_swallowed(plugins: Path) -> None:
    (plugins / "slow.py").write_text("raise KeyboardInterrupt")
    with installed(point("slow", "slow:FAMILY", "dist-slow")), pytest.raises(KeyboardInterrupt):
        registry.resolve("slow")


@pytest.mark.parametrize(
    ("name", "distribution"),
    [
        ("AutoencoderKL", "fastvideo-vae-autoencoder-kl"),
        ("AutoencoderKLWan", "fastvideo-vae-wan"),
        ("wan", "fastvideo-vae-wan"),
        ("AutoencoderOobleck", "fastvideo-vae-oobleck"),
        ("CausalVideoAutoencoder", "fastvideo-vae-ltx2"),
        ("AutoencoderKLHunyuanVideo", "fastvideo-vae-gamecraft"),
    ],
)
def test_a_class_of_a_package_that_is_not_installed_says_which(name: str, distribution: str) -> None:
    with installed(*POINTS), pytest.raises(FamilyError, match=f"pip install {distribution}"):
        registry.resolve(name)


def test_a_class_of_a_package_that_is_installed_and_broken_says_why(plugins: Path) -> None:
    (plugins / "broken.py").write_text("raise RuntimeError('no licence')")
    with (
        installed(point("wan", "broken:FAMILY", "fastvideo-vae-wan")),
        pytest.raises(FamilyError, match="no licence") as caught,
    ):
        registry.resolve("AutoencoderKLWan")
    assert "pip install" not in str(caught.value)


def test_a_name_that_nobody_knows_lists_what_is_installed() -> None:
    with installed(*POINTS), pytest.raises(FamilyError, match=r"installed: toy_audio, toy_image, toy_video"):
        registry.resolve("AutoencoderXYZ")
    with installed(), pytest.raises(FamilyError, match=r"installed: none"):
        registry.resolve("AutoencoderXYZ")


def test_an_unknown_component_names_those_there_are() -> None:
    with installed(*POINTS):
        family = registry.resolve("toy_image")
        assert family.component(None) is family.component("vae")
        with pytest.raises(FamilyError, match="toy_image has no component 'vocoder'; it has vae"):
            family.component("vocoder")
