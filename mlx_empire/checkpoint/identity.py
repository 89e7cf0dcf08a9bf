"""What a checkpoint says about the run that wrote it, and what the run must find again besides the checkpoint."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mlx_empire import __version__
from mlx_empire.checkpoint.manifest import Manifest, Resolved, Shard, digest_of
from mlx_empire.errors import UserError
from mlx_empire.formats.hf_folder import open_folder
from mlx_empire.formats.safetensors import open_plain
from mlx_empire.plan.shards import ShardPlan

SAMPLES, SAMPLE_BYTES = 64, 1 << 14


def sampled_digest(folder: Path) -> str:
    """SHA-256 over each weight file's name, size, header and 64 evenly spaced samples of 16 KiB.

    Not of every byte: a base may have hundreds of GB. Two bases that differ in a tensor's dtype or shape, or were
    trained differently, have different digests; a single flipped bit may go unseen.
    """
    digest = hashlib.sha256()
    for name, header in sorted(open_folder(folder).files.items()):
        digest.update(f"{name}\0{header.file_bytes}\0".encode() + header.raw)
        with open_plain(folder / name) as file:
            for k in range(SAMPLES):
                file.seek(header.file_bytes * k // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def config_digest(folder: Path) -> str | None:
    """SHA-256 over what a model folder's config.json says, however it is laid out; None where it says nothing."""
    try:
        with open_plain(folder / "config.json") as file:
            said = json.dumps(json.load(file), sort_keys=True)
    except (OSError, UserError, ValueError, RecursionError):
        return None
    return digest_of(said.encode())


@dataclass(frozen=True)
class Origin:
    """What a run, or a daughter, stands on: the recipe as YAML, and digests of what is not saved.

    `data`: of the rows; `base`: of frozen weights (None where there are none); `config`: of what the model's
    config.json says (None where it says nothing, or an earlier version noted nothing).
    """

    recipe: str
    data: str
    base: str | None
    config: str | None = None


@dataclass(frozen=True)
class Identity:
    """A run as its checkpoints describe it."""

    origin: Origin
    global_size: int
    seed: int
    resolved: Resolved
    plan: ShardPlan

    def manifest(
        self, step: int, numerics: Mapping[str, Sequence[float]], shards: Sequence[Shard]
    ) -> Manifest:
        """The manifest of the state after `step` steps."""
        return Manifest(
            format=1,
            step=step,
            written_by=versions(),
            recipe=self.origin.recipe,
            recipe_digest=digest_of(self.origin.recipe.encode()),
            data_digest=self.origin.data,
            next_row=step * self.global_size,
            seed=self.seed,
            base=self.origin.base,
            config=self.origin.config,
            resolved=self.resolved,
            numerics={name: tuple(map(float, values)) for name, values in numerics.items()},
            zero_stage=self.plan.zero_stage,
            shares=self.plan.shares,
            shards=tuple(shards),
        )


def versions() -> dict[str, str]:
    """What wrote a checkpoint."""
    packages = {name: metadata.version(name) for name in ("mlx", "mlx-lm", "numpy")}
    system = f"{platform.system()} {platform.machine()}"
    return {"mlx_empire": __version__, **packages, "python": platform.python_version(), "system": system}
