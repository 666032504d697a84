"""Configurations are checked once, with bounds, before anything is allocated."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvideo_vae_core.config import VAEArchConfig, VAEConfig, bounded, read_config
from fastvideo_vae_core.errors import ConfigError
from fastvideo_vae_core.testing.toys import ToyArchConfig


@dataclass(frozen=True, kw_only=True)
class Example(VAEArchConfig):
    channels: int = bounded(3, 1, 8192)
    widths: tuple[int, ...] = bounded((8, 16), 1, 8192)
    shift: float | None = bounded(None, -10, 10)
    act: Literal["silu", "relu"] = "silu"
    kinds: tuple[Literal["a", "b"], ...] = ("a",)
    upcast: bool = True


class TestArchConfig:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("channels", 10**9),
            ("channels", 0),
            ("channels", -1),
            ("channels", True),
            ("channels", 3.0),
            ("channels", "3"),
            ("channels", None),
            ("channels", [3]),
            ("widths", 8),
            ("widths", []),
            ("widths", [8, 10**9]),
            ("widths", [8, None]),
            ("widths", [8, True]),
            ("widths", [8] * 2000),
            ("scaling_factor", math.nan),
            ("scaling_factor", math.inf),
            ("scaling_factor", 0),
            ("scaling_factor", True),
            ("scaling_factor", 10**400),
            ("shift", math.nan),
            ("shift", 11),
            ("act", "gelu"),
            ("act", ["silu"]),
            ("kinds", ["a", "c"]),
            ("kinds", "a"),
            ("upcast", 1),
            ("upcast", "true"),
        ],
        ids=lambda value: str(value)[:16],
    )
    def test_a_field_out_of_bounds_or_of_another_type_is_named(self, field: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=rf"Example\.{field} must"):
            Example.from_dict({field: value})

    def test_json_values_become_those_of_the_annotations(self) -> None:
        config = Example.from_dict(json.loads('{"widths": [4, 8], "scaling_factor": 2, "shift": -1, "kinds": ["b"]}'))
        assert (config.widths, config.scaling_factor, config.shift, config.kinds) == ((4, 8), 2.0, -1.0, ("b",))
        assert isinstance(config.scaling_factor, float)
        assert isinstance(config.shift, float)

    def test_the_bounds_themselves_are_allowed(self) -> None:
        assert Example(channels=1).channels == 1
        assert Example(channels=8192, shift=-10).channels == 8192

    def test_private_keys_are_dropped(self) -> None:
        assert Example.from_dict({"_class_name": "X", "_diffusers_version": "0", "channels": 5}) == Example(channels=5)

    def test_unknown_keys_are_named_with_the_known_ones(self) -> None:
        with pytest.raises(ConfigError, match=r"Example has no field chanels, depth; it knows .*channels"):
            Example.from_dict({"depth": 1, "chanels": 3})

    def test_it_is_frozen_and_keyword_only(self) -> None:
        with pytest.raises(FrozenInstanceError):
            Example().channels = 4  # type: ignore[misc]
        with pytest.raises(TypeError):
            Example(4)  # type: ignore[misc]

    def test_replacing_a_field_checks_it(self) -> None:
        with pytest.raises(ConfigError, match="channels"):
            replace(Example(), channels=10**9)

    @given(
        st.builds(
            Example,
            channels=st.integers(1, 8192),
            widths=st.lists(st.integers(1, 8192), min_size=1, max_size=5),
            shift=st.none() | st.floats(-10, 10),
            act=st.sampled_from(["silu", "relu"]),
            kinds=st.lists(st.sampled_from(["a", "b"])),
            upcast=st.booleans(),
        )
    )
    def test_it_survives_json(self, config: Example) -> None:
        assert Example.from_dict(json.loads(json.dumps(config.to_dict()))) == config


class TestVAEConfig:
    def test_fields_of_the_architecture_read_through(self) -> None:
        config = VAEConfig(arch_config=ToyArchConfig(width=16))
        assert (config.width, config.scaling_factor, config.use_tiling) == (16, 0.5, False)

    def test_an_unknown_attribute_names_both_classes(self) -> None:
        with pytest.raises(AttributeError, match=r"neither VAEConfig nor ToyArchConfig has 'wdth'"):
            _ = VAEConfig(arch_config=ToyArchConfig()).wdth

    def test_it_can_be_copied_and_pickled(self) -> None:
        config = VAEConfig(arch_config=ToyArchConfig(), fp16="retry", use_tiling=True)
        assert copy.deepcopy(config) == config
        assert copy.copy(config) == config
        assert pickle.loads(pickle.dumps(config)) == config

    def test_loading_nothing_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="both off"):
            VAEConfig(load_encoder=False, load_decoder=False)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("encode_dtype", "int8"),
            ("decode_dtype", "fp16"),
            ("fp16", "never"),
            ("illegal_sizes", "crop"),
            ("use_tiling", 1),
            ("tile_sample_min_height", 0),
            ("tile_sample_min_width", 2**21),
            ("arch_config", {"width": 8}),
            ("pretrained_path", 5),
        ],
    )
    def test_a_setting_out_of_bounds_or_of_another_type_is_named(self, field: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=rf"VAEConfig\.{field} must"):
            VAEConfig(**{field: value})


class TestReadConfig:
    def test_it_reads_an_object(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"_class_name": "X", "width": 8}')
        assert read_config(tmp_path / "config.json") == {"_class_name": "X", "width": 8}

    @pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"a": 1' + b"0" * 5000 + b"}"])
    def test_anything_else_is_refused(self, tmp_path: Path, text: bytes) -> None:
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(ConfigError, match=r"config\.json"):
            read_config(tmp_path / "config.json")

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="absent"):
            read_config(tmp_path / "absent.json")

    def test_json_that_is_nested_too_deeply_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"a":' * 100_000)
        with pytest.raises(ConfigError, match=r"config\.json"):
            read_config(tmp_path / "config.json")
