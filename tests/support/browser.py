"""A headless Chromium that opens a page in a light or dark system and says what a reader gets to see.

The measuring script is added to a copy of the page; the page itself has none. No window of Chromium is narrower than
500 pixels, so a narrower page is opened in a frame of that width.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest

ENOUGH = 4.5  # contrast of text, WCAG 2 AA
NAMES = ("chromium", "chromium-browser", "google-chrome")
# Contrast after WCAG 2: (lighter + 0.05) / (darker + 0.05) of relative luminances.
MEASURE = """
<script>
const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
function rgba(colour) {
  context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
  const p = context.getImageData(0, 0, 1, 1).data; return [p[0], p[1], p[2], p[3] / 255];
}
function under(element) {
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
  let colour = [255, 255, 255];
  for (const l of layers.reverse()) colour = colour.map((c, i) => c * (1 - l[3]) + l[i] * l[3]);
  return colour;
}
function luminance(c) {
  const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(a, b) {
  const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05);
}
document.querySelectorAll('details').forEach(d => d.open = true);
const texts = [];
for (const e of document.querySelectorAll('body *')) {
  if (e.tagName === 'SCRIPT' || e.tagName === 'title') continue;  // neither is shown
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  if (!own) continue;
  const style = getComputedStyle(e), ground = under(e), opacity = +style.opacity;
  const ink = rgba(e instanceof SVGElement ? style.fill : style.color);
  const seen = ink.slice(0, 3).map((c, i) => c * opacity + ground[i] * (1 - opacity));
  texts.push({text: e.textContent.trim().slice(0, 40), contrast: contrast(seen, ground)});
}
const bars = [...document.querySelectorAll('.bar')].map(bar => {
  const at = e => { const r = e.getBoundingClientRect(), b = bar.getBoundingClientRect();
    return {left: r.left - b.left, width: r.width, height: r.height, title: e.title,
            contrast: contrast(rgba(getComputedStyle(e).backgroundColor), under(bar))}; };
  return {width: bar.getBoundingClientRect().width, label: bar.getAttribute('aria-label'),
          parts: [...bar.querySelectorAll('.part')].map(at), limit: at(bar.querySelector('.limit')),
          machine: at(bar.querySelector('.machine')), over: [...bar.querySelectorAll('.over')].map(at)};
});
const result = document.createElement('pre');
result.id = 'measured';
result.textContent = JSON.stringify({
  ground: luminance(under(document.body)), texts, bars, images: document.images.length,
  requests: performance.getEntriesByType('resource').map(r => r.name),
  counts: Object.fromEntries(SELECTORS.map(s => [s, document.querySelectorAll(s).length])),
  thin: [...document.querySelectorAll('.thin .fill')].map(e => (
    {torn: getComputedStyle(e).clipPath !== 'none'})),
  cells: [...document.querySelectorAll('td.cell')].map(c => ({text: c.innerText, shade: under(c)})),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth});
document.body.append(result);
if (parent !== window) parent.postMessage(result.textContent, '*');
</script>
"""
NARROWEST = 500
FRAME = """<!doctype html><html style="color-scheme: light dark"><body>
<iframe src="measured.html" style="width: {width}px; height: 1000px; border: 0"></iframe>
<script>addEventListener('message', told => {{
  const result = document.createElement('pre');
  result.id = 'measured'; result.textContent = told.data; document.body.append(result);
}});</script></body></html>"""


def chromium() -> str | None:
    """The browser's path, or None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


needs_browser = pytest.mark.skipif(chromium() is None, reason="no chromium (Debian: apt install chromium)")


def measure(
    page: str, folder: Path, *, dark: bool, width: int = 1200, selectors: Sequence[str] = ()
) -> dict[str, Any]:
    """Open `page` (HTML) and measure texts, bars, cells and what sticks out sideways.

    Also which `requests` it made, what its `console` said, and the `counts` of what CSS selectors find.
    """
    browser = chromium()
    assert browser is not None
    copy = folder / "measured.html"
    script = MEASURE.replace("SELECTORS", json.dumps(list(selectors)))
    copy.write_text(page.replace("</body>", script + "</body>"), encoding="utf-8")
    if width < NARROWEST:
        copy = folder / "frame.html"
        copy.write_text(FRAME.format(width=width), encoding="utf-8")
    command = [
        browser,
        "--headless",
        "--no-sandbox",  # Chromium's own sandbox does not start as root
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=10000",  # of its own clock: until the frame has told
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={max(width, NARROWEST)},1000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--dump-dom",
        copy.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"{browser} measured nothing (exit code {done.returncode}):\n{done.stderr[-2000:]}"
    measured: dict[str, Any] = json.loads(unescape(found[1]))
    measured["console"] = re.findall(r":CONSOLE[:(].*", done.stderr)
    return measured
