"""Decides the looks of our pages: one style sheet for light and dark, chosen by the reader's system.

Colours of what fills memory are blues, violets and browns; green, amber and red are kept for verdicts, and no
meaning hangs on a colour alone: every cell and every bar says in words what it shows.

Decides too how the file of an option such as `--html` is written: whether that can be done is said before the work, and
what stood there stays until there is something to put in its place.
"""

import os
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path

from mlx_empire.errors import UserError

LIGHT = """
  --page: #f5f6f8; --card: #ffffff; --ink: #1a2330; --muted: #566376; --line: #dde2e9; --track: #eceff3;
  --fits: #18794a; --tight: #9a6200; --no: #bb2d24; --accent: #2f5fc4; --limit: #1a2330;
  --weights: #3a6fd8; --optimizer: #8757cf; --gradients: #cf4f8c; --gathered: #8bb8f5; --adapters: #4b3f91;
  --activations: #178f8f; --logits: #9a7142; --other: #98a3b0;
"""
DARK = """
  --page: #0e1217; --card: #161c24; --ink: #e7ebf1; --muted: #9aa7b8; --line: #2a3340; --track: #222a35;
  --fits: #46c07c; --tight: #e3a93a; --no: #f4736a; --accent: #7ea6ff; --limit: #ffffff;
  --weights: #5a8cf0; --optimizer: #a47ce9; --gradients: #e679ae; --gathered: #a9cbff; --adapters: #7d70d6;
  --activations: #3cb9b4; --logits: #bd9461; --other: #748191;
"""

# Whoever is shown the page inside another one can force a theme with data-theme on the root element.
STYLE = f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ {DARK} }} }}
:root[data-theme=dark] {{ color-scheme: dark; {DARK} }}
:root[data-theme=light] {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 -apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }}
main {{ max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }}
h1 {{ font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -.01em; overflow-wrap: anywhere; }}
h2 {{ font-size: 17px; margin: 0 0 4px; }}
* + h2 {{ margin-top: 22px; }}
p {{ margin: 0 0 10px; }}
.muted {{ color: var(--muted); }}
.small {{ font-size: 13px; }}
section, header {{ background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px 22px;
  margin: 0 0 18px; }}
header {{ border-left: 6px solid var(--verdict); }}
.badge {{ display: inline-block; padding: 2px 10px; border-radius: 99px; font-size: 13px; font-weight: 650;
  color: var(--verdict); border: 1.5px solid var(--verdict); white-space: nowrap; }}
header .badge {{ margin-bottom: 8px; }}
.v-fits {{ --verdict: var(--fits); }} .v-tight {{ --verdict: var(--tight); }} .v-no {{ --verdict: var(--no); }}
.v-none {{ --verdict: var(--muted); }}
.figures {{ display: flex; flex-wrap: wrap; gap: 14px 34px; margin-top: 16px; }}
.figures div {{ display: flex; flex-direction: column; }}
.figures b {{ font-size: 19px; font-weight: 650; font-variant-numeric: tabular-nums; }}
.figures span {{ color: var(--muted); font-size: 13px; }}
.node {{ display: grid; grid-template-columns: 225px 1fr 170px; gap: 4px 16px; align-items: center; padding: 9px 0;
  border-top: 1px solid var(--line); }}
.node:first-of-type {{ border-top: 0; }}
.node .name b {{ display: block; overflow-wrap: anywhere; }}
.node .says {{ text-align: right; font-variant-numeric: tabular-nums; }}
.node .says b {{ color: var(--verdict); white-space: nowrap; }}
.bar {{ position: relative; height: 30px; }}
.bar i {{ position: absolute; top: 3px; height: 24px; display: block; }}
.bar .machine {{ background: var(--track); border-radius: 5px; }}
.bar .part {{ border-right: 1px solid var(--card); }}
.bar .over {{ background: repeating-linear-gradient(135deg, var(--no) 0 5px, transparent 5px 9px); }}
.bar .limit {{ top: -1px; height: 32px; width: 2px; background: var(--limit); }}
.legend {{ display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--muted); margin: 10px 0 2px; }}
.legend i {{ display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }}
.legend i.line {{ width: 2px; height: 14px; border-radius: 0; background: var(--limit); vertical-align: -2px; }}
.legend i.hatch {{ background: repeating-linear-gradient(135deg, var(--no) 0 3px, transparent 3px 5px); }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
th, td {{ text-align: left; padding: 6px 12px 6px 0; border-top: 1px solid var(--line); vertical-align: top; }}
thead th {{ color: var(--muted); font-weight: 500; font-size: 13px; border-top: 0; white-space: nowrap; }}
tbody th {{ font-weight: 500; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.confusion td {{ color: var(--verdict); }}
tr.total td, tr.total th, tr.chosen td, tr.chosen th {{ font-weight: 650; }}
code {{ font: 13px/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }}
ol.advice {{ list-style: none; margin: 8px 0 0; padding: 0; }}
ol.advice li {{ border-top: 1px solid var(--line); padding: 9px 0; display: grid; gap: 2px 16px;
  grid-template-columns: minmax(200px, 2fr) 4fr auto; align-items: baseline; }}
ol.advice li:first-child {{ border-top: 0; }}
.typed {{ display: flex; gap: 10px; align-items: baseline; min-width: 0; }}
.typed code {{ white-space: nowrap; overflow-x: auto; min-width: 0; color: var(--muted); user-select: all; }}
.advice .typed {{ grid-column: 1 / -1; }}
p.look {{ margin: 10px 0 2px; }}
.heat {{ font-size: 13px; line-height: 20px; }}
.heat th, .heat td {{ padding: 2px 10px 2px 0; }}
.heat td.cell {{ text-align: center; padding: 2px 8px; border: 1px solid var(--card); border-radius: 6px;
  background: color-mix(in srgb, var(--verdict) var(--depth), var(--card)); white-space: nowrap;
  font-variant-numeric: tabular-nums; }}
.heat td.cell b {{ font-weight: 650; }}
.heat td.differs {{ outline: 2px dashed var(--ink); outline-offset: -3px; }}
.heat th.cluster {{ text-align: center; }}
.rung {{ display: grid; grid-template-columns: 190px 1fr 230px; gap: 2px 16px; padding: 9px 0; align-items: center;
  border-top: 1px solid var(--line); }}
.rung .bars {{ display: grid; gap: 3px 12px; grid-template-columns: auto 84px 1fr; align-items: center; }}
.thin {{ position: relative; height: 17px; min-width: 120px; }}
.thin i {{ position: absolute; top: 1px; height: 15px; border-radius: 3px; }}
.thin .machine {{ background: var(--track); }}
.thin .fill {{ background: color-mix(in srgb, var(--verdict) 62%, var(--card)); }}
.thin .torn {{ --in: calc(100% - 7px);
  clip-path: polygon(0 0, 100% 0, var(--in) 25%, 100% 50%, var(--in) 75%, 100% 100%, 0 100%); }}
.thin .limit {{ top: -1px; height: 19px; width: 2px; background: var(--limit); border-radius: 0; }}
.lanes {{ display: grid; grid-template-columns: minmax(90px, auto) auto 1fr; gap: 3px 12px; align-items: center;
  margin: 10px 0 4px; }}
.lane {{ position: relative; height: 15px; background: var(--track); border-radius: 3px; overflow: hidden; }}
.lane i {{ position: absolute; top: 0; height: 100%; }}
details {{ margin: 10px 0; }}
details > summary {{ cursor: pointer; color: var(--accent); }}
footer {{ color: var(--muted); font-size: 13px; padding: 0 4px; }}
@media (max-width: 720px) {{
  .node, .rung, ol.advice li {{ grid-template-columns: 1fr; }}
  .node .says {{ text-align: left; }}
  .badge {{ justify-self: start; }}
  .heat td.cell {{ padding: 2px; font-size: 12px; }}
  .heat th {{ font-size: 12px; overflow-wrap: anywhere; padding-right: 4px; }}
  .heat .number, .heat .wide {{ display: none; }}
  .rows thead {{ display: none; }}
  .rows tr {{ display: block; padding: 8px 0; border-top: 1px solid var(--line); }}
  .rows th, .rows td {{ display: block; border: 0; padding: 2px 0; overflow-wrap: anywhere; }}
  .rows th {{ font-weight: 650; }}
  .rows td[data-name] {{ display: flex; justify-content: space-between; gap: 14px; white-space: normal; }}
  .rows td[data-name]::before {{ content: attr(data-name); color: var(--muted); }}
  .lanes {{ grid-template-columns: auto auto; }}
  .lane {{ grid-column: 1 / -1; }}
}}
@media print {{
  section, header {{ break-inside: avoid; }}
  body {{ background: none; }}
  .typed code {{ white-space: normal; }}
  button.copy {{ display: none; }}
}}
"""


def refuse_source(option: str, path: Path, sources: Iterable[Path | None]) -> None:
    """UserError where the file that `option` names is one of those that are read; it is left as it is."""
    read = (one for one in sources if one is not None and os.path.exists(one))
    if os.path.exists(path) and any(os.path.samefile(path, one) for one in read):
        raise UserError(f"{option}: {path}: is read here, and is left as it is; choose another name")


def refuse_unwritable_file(option: str, path: Path | None, sources: Iterable[Path | None]) -> None:
    """UserError where the file that `option` names, if it is asked for, is one of `sources` or cannot be written."""
    if path is None:
        return
    refuse_source(option, path, sources)
    there = os.path.lexists(path)
    try:
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise _unwritable(option, path, error) from None


def refuse_unwritable_files(asked: Mapping[str, Path | None], sources: Iterable[Path | None]) -> None:
    """UserError where two options name one file, or one of them (by option, None: not asked for) is one of `sources` or
    cannot be written.
    """
    refuse_same_file(asked)
    read = list(sources)
    for option, path in asked.items():
        refuse_unwritable_file(option, path, read)


def refuse_same_file(asked: Mapping[str, Path | None]) -> None:
    """UserError where the files that two options name are one: the second would be written over the first."""
    named = [(option, path, os.path.realpath(path)) for option, path in asked.items() if path is not None]
    for (first, _, place), (second, path, other) in combinations(named, 2):
        if place == other:
            raise UserError(f"{second}: {path}: is what {first} writes; choose another name")


def write_file(option: str, path: Path, text: str) -> None:
    """Write what `option` asks for; UserError where that cannot be done."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(option, path, error) from None


def _unwritable(option: str, path: Path, error: OSError) -> UserError:
    return UserError(f"{option}: {path}: {error.strerror}; choose a file that can be written")
