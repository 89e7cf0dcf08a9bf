"""Where a made-up run's files lie, for tests of the disk ledger."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_empire.plan.disk import Places


def places(
    folders: tuple[str, ...], disks: tuple[str, ...], free: Mapping[str, int] | None = None, first: str = ""
) -> Places:
    """By rank, checkpoint folders and file systems; what rank 0 writes besides lies on `first` (its own one)."""
    own = first or disks[0]
    names = {disk: disk for disk in (*disks, own)}
    return Places(folders, disks, own, own, own, names, free or {})
