"""Where a checkpoint is: a directory, a file or a hub repository, to its weights and configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo_vae_core.checkpoint import SUFFIXES, Checkpoint, listing, open_checkpoint, shards
from fastvideo_vae_core.config import VAEArchConfig, VAEConfig, read_config
from fastvideo_vae_core.errors import CheckpointError, ConfigError
from fastvideo_vae_core.family import Component

# In the order in which they are preferred.
_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.pt",
    "pytorch_model.bin",
)
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Found:
    """A source that was opened: its tensors, and its configuration where there is one."""

    checkpoint: Checkpoint
    config: Mapping[str, Any] | None

    def config_for(self, component: Component) -> Mapping[str, Any] | None:
        """The configuration, or else the official one of that component beside the weights."""
        if self.config is None and component.official_config is not None:
            beside = self.checkpoint.paths[0].parent / component.official_config
            return read_config(beside) if beside.exists() else None
        return self.config


def find(
    source: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    config: VAEConfig | Mapping[str, Any] | str | Path | None = None,
    folder: str = "vae",
) -> Found:
    """Open what a path or hub id names: its weights, and the configuration beside them or the one that is given.

    folder: where they are in a pipeline, if no subfolder is given.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = _from_hub(str(source), subfolder, revision, folder)
    elif revision is not None:
        raise ConfigError(f"{source} is a local path and has no revision {revision!r}")
    elif subfolder is not None:
        path = path / subfolder
    if path.is_dir() and subfolder is None and not (path / "config.json").exists() and (path / folder).is_dir():
        path = path / folder
    weights = _weights_in(path) if path.is_dir() else (path,)
    if isinstance(config, (str, Path)):
        config = read_config(Path(config))
    if isinstance(config, VAEConfig) and type(config.arch_config) is not VAEArchConfig:
        config = config.arch_config.to_dict()
    if config is None or isinstance(config, VAEConfig):
        # A single file has a configuration of its own beside it only where diffusers' names say so.
        owned = path.is_dir() or path.name.startswith("diffusion_pytorch_model")
        beside = (path if path.is_dir() else path.parent) / "config.json"
        config = read_config(beside) if owned and beside.exists() else None
    return Found(open_checkpoint(weights), config)


def _weights_in(folder: Path) -> tuple[Path, ...]:
    name = _preferred([path.name for path in folder.iterdir()], str(folder))
    path = folder / name
    return shards(path) if name.endswith(_INDEX) else (path,)


def _preferred(names: Collection[str], where: str) -> str:
    """The file to read among those in a folder, by the names that weights are published under."""
    for name in _WEIGHTS:
        if name in names:
            return name
    files = sorted(name for name in names if name.endswith(SUFFIXES))
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(f"{where} holds several weight files ({listing(files)}); pass the one you mean")
    raise CheckpointError(f"{where} holds no weights (looked for {', '.join(SUFFIXES)})")


def _from_hub(source: str, subfolder: str | None, revision: str | None, pipeline_folder: str) -> Path:
    """Download the configuration and one set of weights of a hub repository, and give the folder they are in."""
    # Where the owner is a folder here, somebody mistyped a path, and asking the hub would only take time.
    local = source.startswith((".", "/", "~")) or source.endswith(SUFFIXES) or Path(source).parent.is_dir()
    if source.count("/") != 1 or local:
        raise CheckpointError(f"{source} does not exist, and is no hub id of the form owner/name")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise CheckpointError(f'{source} is no local path; for the hub install "fastvideo-vae-core[hub]"') from None
    try:
        files = hub.list_repo_files(source, revision=revision)
    # The hub's HTTP client raises errors of its own, and which client that is changed between versions.
    except Exception as error:
        # Without a network, what was downloaded before still loads.
        try:
            root = Path(hub.snapshot_download(source, revision=revision, local_files_only=True))
        except (OSError, ValueError):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{source} is no local path, and the hub did not give it: {reason}") from None
        files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    piped = "config.json" not in files and f"{pipeline_folder}/config.json" in files
    folder = subfolder or (pipeline_folder if piped else ".")
    inside = [Path(name).name for name in files if Path(name).parent == Path(folder)]
    weights = _preferred(inside, f"{source} ({folder})")
    # An index names its shards, "stem-00001-of-00002.safetensors".
    wanted = ["config.json", "model_config.json", weights, f"{weights.removesuffix(_INDEX)}-*.safetensors"]
    try:
        root = Path(
            hub.snapshot_download(
                source,
                revision=revision,
                allow_patterns=[f"{folder}/{each}" if folder != "." else each for each in wanted],
            )
        )
    except Exception as error:
        raise CheckpointError(f"{source} could not be downloaded: {error}") from None
    return root / folder
