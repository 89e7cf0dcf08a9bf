"""The border to mlx-lm's code: what goes wrong beyond it, before training, becomes one line that names the model.

Only what goes wrong beyond it: a fault of ours keeps its traceback.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from types import TracebackType

from mlx_empire.errors import EmpireError, UserError

MOST_CHARACTERS = 160


@contextlib.contextmanager
def foreign(place: str, *, mixed: bool = False) -> Iterator[None]:
    """Run mlx-lm's code; `place` begins the UserError's line: the model, and what mlx-lm's code was asked to do.

    `mixed`: our code runs inside as well, and an error whose innermost frame is ours is raised as it is; else what
    is printed is kept from the terminal, for a module that ends the program says there why.
    """
    said = io.StringIO()
    try:
        with contextlib.nullcontext() if mixed else contextlib.redirect_stdout(said):
            yield
    except EmpireError:
        raise
    except SystemExit as error:
        raise UserError(f"{place}: {first_line(said.getvalue()) or f'it exits ({error})'}") from None
    except Exception as error:
        if mixed and _is_ours(error.__traceback__):
            raise
        raise UserError(f"{place}: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """What an exception says, in one line; its kind where its text alone would not be understood."""
    kind, text = type(error).__name__, first_line(str(error))
    if not text:
        return kind
    return text if isinstance(error, ValueError | RuntimeError) else f"{kind}: {text}"


def first_line(text: str) -> str:
    """The first line of a text, cut to a length that a terminal shows."""
    return (text.strip().splitlines() or [""])[0][:MOST_CHARACTERS]


def _is_ours(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame runs our code."""
    assert traceback is not None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return str(traceback.tb_frame.f_globals.get("__name__", "")).startswith("mlx_empire.")
