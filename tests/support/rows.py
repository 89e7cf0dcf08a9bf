"""Rows as a person writes them, and the folder of a small model whose tokens they become."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MODEL = FIXTURES / "tiny-llama-260k"


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    """A conversation of one question."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def writer(folder: Path) -> Callable[..., Path]:
    """write("train.jsonl", row, row, ...): a file of JSON lines in `folder`; strings are written as they are."""

    def write(name: str, *rows: Any) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write
