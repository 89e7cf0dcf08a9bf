"""An evaluation as a page without scripts: scores before and after, free and held by a grammar; the rows that changed;
who was refused an answer, and the rows that are wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_empire.evaluate.document import columns
from mlx_empire.page.render import still_page

HERE = Path(__file__).parent


def evaluation_page(document: Mapping[str, Any]) -> str:
    """The page as HTML; `document` is `changed_document`'s."""
    return still_page(HERE / "templates", "evaluation", found=document, pairs=columns(document["scores"]))
