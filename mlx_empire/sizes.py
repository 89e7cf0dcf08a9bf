"""Decides how bytes look to a person: in the largest of GiB, MiB and KiB that leaves no zero before the point."""

from __future__ import annotations

KIB, MIB, GIB = 2**10, 2**20, 2**30


def amount(count: float) -> str:
    """Bytes with three digits that matter: 7.45 GiB, 512 MiB; below a MiB whole KiB."""
    unit, name = next(
        ((size, name) for size, name in ((GIB, "GiB"), (MIB, "MiB")) if abs(count) >= size), (KIB, "KiB")
    )
    value = count / unit
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits if unit > KIB else 0}f} {name}"
