"""Names of the tensors in files, as tables, and what the tensors say of the architecture."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from fastvideo_vae_core.checkpoint import RenameTable, Rule
from fastvideo_vae_core.errors import CheckpointError
from fastvideo_vae_core.family import Evidence, Inferred
from fastvideo_vae_core.weight_norm import unfold
from fastvideo_vae_oobleck.config import ACE_STEP, STABLE_AUDIO_OPEN, OobleckArchConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

# Weight norm is folded when a checkpoint is opened, so the tables know plain weights only.
_CONV = r"(?P<leaf>weight|bias)"
_SNAKE = r"(?P<leaf>alpha|beta)"
_UNIT = {"0": ("snake1", _SNAKE), "1": ("conv1", _CONV), "2": ("snake2", _SNAKE), "3": ("conv2", _CONV)}


def diffusers_rules(names: Collection[str]) -> RenameTable:
    """The model's own names."""
    return RenameTable([Rule(r"((?:encoder|decoder)\..+)", r"\1")])


def official_rules(names: Collection[str]) -> RenameTable:
    """stable-audio-tools' names: every layer of a sequence has its number."""
    rules = []
    for half in ("encoder", "decoder"):
        stages = _count(names, rf"{half}\.layers\.(\d+)\.layers\.")
        rules += [
            Rule(rf"{half}\.layers\.0\.{_CONV}", rf"{half}.conv1.\g<leaf>"),
            Rule(rf"{half}\.layers\.{stages + 1}\.{_SNAKE}", rf"{half}.snake1.\g<leaf>", reshape=True),
            Rule(rf"{half}\.layers\.{stages + 2}\.{_CONV}", rf"{half}.conv2.\g<leaf>"),
        ]
        for stage in range(stages):
            rules += _stage(half, rf"{half}\.layers\.{stage + 1}\.layers", f"{half}.block.{stage}")
    # What a training checkpoint of the autoencoder has besides.
    dropped = Rule(r"(?:discriminator|autoencoder_ema|teacher_model|sdstft|lrstft|losses_gen|losses_disc)\..+", None)
    return RenameTable([*rules, dropped])


def _stage(half: str, old: str, new: str) -> list[Rule]:
    """A stage of the encoder ends with its change of resolution, one of the decoder begins with it."""
    if half == "encoder":
        snake, conv, name, units = 3, 4, "conv1", (0, 1, 2)
    else:
        snake, conv, name, units = 0, 1, "conv_t1", (2, 3, 4)
    rules = [
        Rule(rf"{old}\.{snake}\.{_SNAKE}", rf"{new}.snake1.\g<leaf>", reshape=True),
        Rule(rf"{old}\.{conv}\.{_CONV}", rf"{new}.{name}.\g<leaf>"),
    ]
    for number, unit in enumerate(units, start=1):
        rules += [
            Rule(rf"{old}\.{unit}\.layers\.{layer}\.{leaf}", rf"{new}.res_unit{number}.{ours}.\g<leaf>", reshape=True)
            for layer, (ours, leaf) in _UNIT.items()
        ]
    return rules


def infer(evidence: Evidence) -> Inferred:
    """The architecture that the tensors of either half have, and the published checkpoint it may be.

    Strides are half of their kernels. The sampling rate leaves no trace: it is that of the published checkpoint with
    these tensors, or else 44.1 kHz.
    """
    arch = _architecture(evidence.shapes)
    for name, constant in {"stable_audio_open": STABLE_AUDIO_OPEN, "ace_step": ACE_STEP}.items():
        if {**arch.to_dict(), "sampling_rate": constant.sampling_rate} == constant.to_dict():
            return Inferred(arch=constant, variants=(name,))
    return Inferred(arch=arch)


def weight_norm_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as diffusers has it, every convolution's weight as a direction `weight_v` and a norm `weight_g`.

    Loading it again gives the same weights bit for bit.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(".weight"):
            state[f"{name}_g"], state[f"{name}_v"] = unfold(tensor)
        else:
            state[name] = tensor
    return state


def _architecture(shapes: Mapping[str, tuple[int, ...]]) -> OobleckArchConfig:
    if "encoder.conv1.weight" in shapes:
        base, audio, _ = shapes["encoder.conv1.weight"]
        stages = _count(shapes, r"encoder\.block\.(\d+)\.")
        convs = [shapes.get(f"encoder.block.{stage}.conv1.weight", (0, 0, 0)) for stage in range(stages)]
        widths, latents = [conv[0] for conv in convs], base // 2
    elif {"decoder.conv1.weight", "decoder.conv2.weight"} <= shapes.keys():
        audio, base, _ = shapes["decoder.conv2.weight"]
        stages = _count(shapes, r"decoder\.block\.(\d+)\.")
        convs = [shapes.get(f"decoder.block.{stage}.conv_t1.weight", (0, 0, 0)) for stage in reversed(range(stages))]
        widths, latents = [conv[0] for conv in convs], shapes["decoder.conv1.weight"][1]
    else:
        raise CheckpointError("the first or last convolution is missing; the autoencoder is not whole")
    other = shapes.get("decoder.conv2.weight", (0, base, 0))[1]
    return OobleckArchConfig.from_dict(
        {
            "encoder_hidden_size": 2 * latents,
            "downsampling_ratios": [conv[2] // 2 for conv in convs],
            "channel_multiples": [width // base for width in widths],
            "decoder_channels": other,
            "decoder_input_channels": latents,
            "audio_channels": audio,
        }
    )


def _count(names: Collection[str], pattern: str) -> int:
    """How many different numbers stand where the pattern has its group."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})
