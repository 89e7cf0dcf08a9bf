"""An evaluation as a page without scripts: scores before and after, and the rows that changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_empire.page.render import still_page

HERE = Path(__file__).parent


def evaluation_page(document: Mapping[str, Any]) -> str:
    """The page as HTML; `document` is `changed_document`'s."""
    return still_page(HERE / "templates", "evaluation", found=document)
