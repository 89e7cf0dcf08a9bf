"""Rows as a person writes them, and the folder of a small model whose tokens they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MODEL = FIXTURES / "tiny-llama-260k"


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    """A conversation of one question."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}
