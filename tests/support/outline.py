"""A page as HTML's own rules read it: whether it is well formed, and whatever in it would fetch or run something."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Outline(HTMLParser):
    """`open`: elements that nothing closes; `tags`: all there are; `suspicious`: attributes that fetch or run a thing;
    `pieces`: what is to be read, `seen` those of them that are there before anything is unfolded."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.suspicious: list[str] = []
        self.pieces: list[str] = []
        self.seen: list[str] = []
        self._folded: list[bool] = []  # by open element: whether it hides what it has besides its summary
        self.feed(page)
        self.close()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element that is closed at once, as SVG has them."""
        self.tags.add(tag)
        self.suspicious += [f"{tag} {name}={value}" for name, value in attrs if _acts(name, value or "")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
            self._folded.append(tag == "details" and "open" not in dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"
        self._folded.pop()

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)
        within_each = [*self.open[1:], ""][: len(self.open)]
        inside = zip(self._folded, within_each, strict=True)
        if not any(folded and within != "summary" for folded, within in inside):
            self.seen.append(data)

    @property
    def text(self) -> str:
        """The pieces with a space between them and between words."""
        return " ".join(" ".join(self.pieces).split())

    @property
    def seen_text(self) -> str:
        """The same of those that are seen."""
        return " ".join(" ".join(self.seen).split())


def _acts(name: str, value: str) -> bool:
    """Whether an attribute fetches or runs something; a picture or a place that lies in the page does not."""
    if name == "href":
        return not value.startswith(("data:image/svg", "#"))
    return name in ("src", "action") or name.startswith("on")
