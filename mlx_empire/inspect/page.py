"""The page of `inspect`: one file without scripts, drawn from the document by the template beside this file.

Everything that comes from data goes through jinja2's escaping; what cannot be seen is spelled (`tokens.visible`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template
from markupsafe import Markup

from mlx_empire.inspect.tokens import visible
from mlx_empire.page.render import templates
from mlx_empire.recipe.text import one_line
from mlx_empire.report.html import STYLE

HERE = Path(__file__).parent
PLACES = 100  # of a finding are on the page
VERDICTS = {
    0: ("fits", "nothing is in the way of training"),
    64: ("no", "a run would refuse this data"),
    65: ("no", "validation rows are in the training data"),
}
SIGNS = {"refused": ("no", "refused"), "leak": ("no", "leak"), "look": ("tight", "look")}


def inspection_page(document: Mapping[str, Any]) -> str:
    """The page as HTML."""
    verdict, says = VERDICTS[document["exit_code"]]
    if not document["exit_code"] and document["findings"]:
        verdict, says = "tight", "worth a look before training"
    return _template().render(
        found=document,
        verdict=verdict,
        says=says,
        signs=SIGNS,
        places=PLACES,
        most=max((one["rows"] for one in document["lengths"]), default=1),
        style=Markup(STYLE),  # noqa: S704  ours alone
    )


@cache
def _template() -> Template:
    made = templates(HERE)
    made.filters |= {"visible": visible, "one_line": one_line, "thousands": "{:,}".format}
    return made.get_template("page.html")
