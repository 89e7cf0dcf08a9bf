"""A run's screen as one file, `report.html`, for mail and archive: data, charts and style in it, and no script."""

from __future__ import annotations

import time
from pathlib import Path

from mlx_empire.disk import replace_private
from mlx_empire.errors import UserError

FILE_NAME = "report.html"


def save_report(folder: Path, out: Path | None = None) -> Path:
    """Write the screen of the run in `folder` to `out`, or into the folder. UserError without a run, OSError."""
    # What draws is no part of a step: only the rank that writes the page imports it, once the result is there.
    from mlx_empire.page.charts import charts_of
    from mlx_empire.page.documents import run_document
    from mlx_empire.page.render import saved_page
    from mlx_empire.page.watch import WatchedRun, full_path

    look = WatchedRun(folder, full_path(folder).name).look()
    if look is None:
        raise UserError(f"{folder}: no run has been here")
    out = out or folder / FILE_NAME
    replace_private(out, saved_page(run_document(look, time.time()), charts_of(look)))
    return out


def try_report(folder: Path) -> str:
    """The same for a run that ends, which nothing here may fail; what there is to say."""
    try:
        return f"the run as a page: {save_report(folder)}"
    except Exception as error:  # the result is written: a picture of it is no reason to fail
        return f"WARNING: {folder / FILE_NAME} was not written: {type(error).__name__}: {error}"
