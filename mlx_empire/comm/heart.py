"""What a watchdog asks of the way to the other ranks, and the heart of a rank that is alone."""

from __future__ import annotations

from typing import Any, Protocol


class Heart(Protocol):
    """Sends to, and receives from, all other ranks; for one thread."""

    def send(self, message: Any) -> None:
        """JSON to everyone who listens."""

    def receive(self) -> list[tuple[int, Any]]:
        """(rank, message) of all that has come."""


class StillHeart:
    """`Heart` of the only rank."""

    def send(self, message: Any) -> None:
        """Nobody listens."""

    def receive(self) -> list[tuple[int, Any]]:
        """Nobody talks."""
        return []
