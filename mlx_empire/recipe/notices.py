"""Decides what a recipe may ask to be told, and where to: the key `report.notify`.

An address is often a secret: whoever knows a Slack, Discord or Home Assistant webhook may post to it. So a part of
it, or all, may be the name of an environment variable on the first machine (`$NTFY`), which stays a name in the run's
recipe.yaml; addresses that are known to be secrets are taken in no other way.
"""

import re
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from mlx_empire.recipe.fields import Section, as_tuple
from mlx_empire.recipe.text import printable

Kind = Literal["end", "failure", "restart", "gate", "spike", "stalled", "disk"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NOTIFY = (
    "{url: https://ntfy.sh/my-empire, on: [end, failure, restart]}: url is an http or https address in which $NAME "
    "stands for an environment variable of the first machine (needed for Slack, Discord and Home Assistant, whose "
    f"addresses are secrets), or left out on a Mac; on is a list of {', '.join(KINDS)}, or left out (all); or null"
)
# Hosts and paths of webhooks that need no other key than their address.
_SECRET = re.compile(
    r"hooks\.slack\.com|discord(app)?\.com/api/webhooks|/api/webhook/|webhook\.office\.com", re.IGNORECASE
)
_VARIABLE = re.compile(r"\$(?:\{[A-Za-z_]\w*\}|[A-Za-z_]\w*)")


def _address(url: str) -> str:
    if not printable(url) or " " in url or "$" in _VARIABLE.sub("", url):
        raise ValueError("not an address")
    if url.startswith("$"):
        return url
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not an http or https address")
    if parts.username or parts.password or (_SECRET.search(url) and not _VARIABLE.search(url)):
        raise ValueError("a secret that would stand in the recipe")
    return url


class Notify(Section):
    """Where notices go (None: a Mac's own notices alone), and which."""

    url: Annotated[str, Field(min_length=1, max_length=2000), AfterValidator(_address)] | None = None
    on: Annotated[tuple[Kind, ...], BeforeValidator(as_tuple), Field(min_length=1, max_length=7)] = KINDS
