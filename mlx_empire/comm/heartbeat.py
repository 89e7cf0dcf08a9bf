"""Heartbeats: what a watchdog asks of the way to the other ranks, and what a rank that is alone answers."""

from __future__ import annotations

from typing import Any, Protocol


class Heartbeat(Protocol):
    """Sends to, and receives from, all other ranks; for one thread."""

    def send(self, message: Any, *, last: bool = False) -> None:
        """JSON to everyone; a peer that has not taken the one before gets none, unless it is the last."""

    def receive(self) -> list[tuple[int, Any]]:
        """(rank, message) of all that has come."""


class SoloHeartbeat:
    """`Heartbeat` of the only rank."""

    def send(self, message: Any, *, last: bool = False) -> None:
        """Nobody listens."""

    def receive(self) -> list[tuple[int, Any]]:
        """Nobody talks."""
        return []
