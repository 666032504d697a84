"""The installed families, found through entry points. Listing them imports nothing but the standard library."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from fastvideo_vae_core.errors import FamilyError
from fastvideo_vae_core.family import Family

GROUP = "fastvideo_vae_core.families"

# So that an unknown class name can say what to install. Core imports none of them.
_KNOWN = {
    "fastvideo-vae-autoencoder-kl": ("autoencoder_kl", "AutoencoderKL"),
    "fastvideo-vae-wan": ("wan", "AutoencoderKLWan", "WanVAE", "WanVAE_", "Wan2_1_VAE", "Wan2_2_VAE"),
    "fastvideo-vae-oobleck": ("oobleck", "AutoencoderOobleck", "OobleckVAE"),
    "fastvideo-vae-ltx2": (
        "ltx2",
        "AutoencoderKLLTX2Video",
        "AutoencoderKLLTX2Audio",
        "CausalVideoAutoencoder",
        "LTX2CausalVideoAutoencoder",
        "LTX2AudioEncoder",
        "LTX2AudioDecoder",
        "LTX2Vocoder",
        "LTX2VocoderWithBWE",
    ),
    "fastvideo-vae-gamecraft": (
        "gamecraft",
        "AutoencoderKLHunyuanVideo",
        "AutoencoderKLCausal3D",
        "GameCraftVAE",
    ),
}


def families() -> tuple[str, ...]:
    """Names of the installed families, sorted, without importing any of them.

    Raises:
        FamilyError: two distributions claim one name.
    """
    return tuple(sorted({point.name for point in _points() if _claim(point.name)}))


def resolve(name: str) -> Family:
    """The family of that name, or the one that answers to that class name.

    Raises:
        FamilyError: nobody answers to the name (with the package to install, if it is known), two distributions claim
            it, or the one that does fails to import.
    """
    if any(point.name == name for point in _points()):
        return _import(_claim(name))
    claims = {family.distribution: family for family in installed().values() if name in family.class_names}
    if len(claims) > 1:
        raise FamilyError(f"{name!r} is claimed by {' and '.join(sorted(claims))}; uninstall one of them")
    if claims:
        return next(iter(claims.values()))
    raise FamilyError(_unknown(name))


def installed() -> dict[str, Family]:
    """Every family that imports, by name. Those that do not are left out here and named by `failures`."""
    return {name: family for name, family in _attempts().items() if isinstance(family, Family)}


def failures() -> dict[str, str]:
    """Families that are installed and cannot be used: name -> reason."""
    return {name: str(error) for name, error in _attempts().items() if isinstance(error, FamilyError)}


def missing() -> dict[str, str]:
    """Known families that are not installed: name -> what to install."""
    present = {point.name for point in _points()}
    return {names[0]: distribution for distribution, names in _KNOWN.items() if names[0] not in present}


def _attempts() -> dict[str, Family | FamilyError]:
    attempts: dict[str, Family | FamilyError] = {}
    for name in sorted({point.name for point in _points()}):
        try:
            attempts[name] = _import(_claim(name))
        except FamilyError as error:
            attempts[name] = error
    return attempts


def _claim(name: str) -> EntryPoint:
    """The one entry point of that name. An editable install beside a wheel lists the same one twice."""
    claims = {(_distribution(point), point.value): point for point in _points() if point.name == name}
    if len(claims) > 1:
        owners = " and ".join(sorted(owner for owner, _ in claims))
        raise FamilyError(f"the family name {name!r} is claimed by {owners}; uninstall one of them")
    return next(iter(claims.values()))


@cache
def _import(point: EntryPoint) -> Family:
    try:
        family = point.load()
    # A plugin may fail in any way while it imports, also by ending the program, and must not take the others down.
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {error}"
        raise FamilyError(f"{_distribution(point)} (family {point.name!r}) fails to import: {cause}") from error
    if not isinstance(family, Family):
        raise FamilyError(f"{_distribution(point)}: {point.value} must be a Family, got {type(family).__name__}")
    return family


@cache
def _points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _unknown(name: str) -> str:
    present = {_distribution(point) for point in _points()}
    for distribution, claimed in _KNOWN.items():
        if name in claimed and distribution not in present:
            return f"{name!r} needs {distribution}, which is not installed: pip install {distribution}"
    broken = "".join(f"; {reason}" for reason in failures().values())
    names = ", ".join(sorted({point.name for point in _points()})) or "none"
    return f"no installed family answers to {name!r} (installed: {names}){broken}"
