"""A command on several devices: torchrun starts it once for each, and the ranks compute together.

Every rank reads the files and loads the model. The first one gets what is computed, writes it and talks; the others are
silent. Whichever fails, all end, with one line from the first that says why.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from fastvideo_vae_core.errors import ConfigError, VAEError
from fastvideo_vae_core.ranks import Ranks, Slab
from fastvideo_vae_core.sharding import Sharding


@contextlib.contextmanager
def together(options: argparse.Namespace) -> Iterator[None]:
    """Run a command inside as one of torchrun's ranks; `options.sharding` says how to compute.

    Raises:
        ConfigError: the ranks cannot be brought together.
        SystemExit: this rank is not the first and has failed; the first one says why.
    """
    options.device = _own_device(options.device)
    backend = "nccl" if options.device.startswith("cuda") else "gloo"
    seconds = options.timeout
    if backend == "nccl":
        torch.cuda.set_device(options.device)
        # NCCL's own watchdog ends the process without a word, so it must not be the first.
        seconds = 2 * seconds + 60
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the ranks do not come together ({reason}); start all of them with one torchrun") from None
    sharding = Sharding(group=dist.group.WORLD, timeout=options.timeout)
    options.sharding, before = sharding, signal.signal(signal.SIGTERM, _leave)
    store, finished = sharding.group.get_group_store(), False
    try:
        with sharding.line.watched():
            yield
        finished = True
    except BaseException as error:
        if sharding.rank == 0:
            with contextlib.suppress(RuntimeError):
                store.set(_SAID, "")
            raise
        # What the first one has to say is said by it, as long as it lives.
        with contextlib.suppress(RuntimeError):
            store.wait([_SAID], timedelta(seconds=options.timeout))
            raise SystemExit(2 if isinstance(error, VAEError) else 1) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        if finished:
            dist.destroy_process_group()


def everywhere(latents: Sequence[Tensor], shape: Sequence[int], sharding: Sharding, like: Tensor) -> Tensor:
    """The latents of that shape, which the first rank has in pieces along axis 2, on every rank; `like` is of their
    type."""
    spans = ((0, shape[2]), *((0, 0),) * (sharding.world - 1))
    own = torch.cat([*latents], 2) if sharding.rank == 0 else like.new_empty((*shape[:2], 0, *shape[3:]))
    (made,) = Ranks(replace(sharding, axis=0)).fetch([(Slab(own, 2, spans), [(0, shape[2])] * sharding.world)])
    return made


def _own_device(name: str) -> str:
    """The device of this rank: one of the GPUs of its machine, or the CPU."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    if name != "cuda":
        raise ConfigError(f"torchrun gives each rank a device of its own, so --device is cuda or cpu, not {name}")
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"there are {torch.cuda.device_count()} GPUs for rank {local} of this machine; pass torchrun"
            f" --nproc-per-node={max(torch.cuda.device_count(), 1)}, or --device cpu"
        )
    return f"cuda:{local}"


def _leave(*_: object) -> NoReturn:
    """torchrun ends the other ranks when one is lost; files that are being written have to go first."""
    raise SystemExit(128 + signal.SIGTERM)


_SAID = "fastvideo_vae/said"
