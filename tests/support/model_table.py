"""Which models of mlx-lm train here: a Markdown table, made by asking what asks before every run.

PYTHONPATH=tests python -m support.model_table
"""

from __future__ import annotations

from mlx_empire.engine.streamable import verify_scaled_down
from mlx_empire.errors import UserError
from support.every_model import models, small_config


def refusal(name: str, **changes: object) -> str | None:
    """The line that refuses a small model of a family, or None; `changes` are made to the language model's keys."""
    config = small_config(name)
    config.get("text_config", config).update(changes)
    try:
        verify_scaled_down(config, name)
    except UserError as error:
        return str(error)
    return None


def main() -> None:
    """Print the table."""
    print("| model of mlx-lm | here |\n|---|---|")
    for name in models():
        line = refusal(name)
        print(
            f"| {name} | {'trains' if line is None else 'refused: ' + line.partition(': ')[2]} |", flush=True
        )


if __name__ == "__main__":
    main()
