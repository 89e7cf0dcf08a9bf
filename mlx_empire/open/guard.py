"""Who may look: in the local network whoever has the token. And what a browser may do with a page: ask this server.

The token stands in the address that is printed. The first visit changes it for a cookie, so that it does not stay in
the address line.
"""

from __future__ import annotations

import secrets

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE, WORD = "mlx_empire_token", "token"
DAYS = 30
HEADERS = {
    # Plotly sets styles of elements itself; nothing else is allowed that does not come from here.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Lets requests with the token through, and all where there is none; only GET and HEAD."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        request = Request(scope)
        answer = self._answer(request)
        await (answer or self._app)(scope, receive, send_with_headers)

    def _answer(self, request: Request) -> Response | None:
        """What is said in place of the page; None where it may be seen."""
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("this page is only read", 405)
        if self._token is None or self._is_token(request.cookies.get(COOKIE)):
            return None
        if not self._is_token(request.query_params.get(WORD)):
            return PlainTextResponse(
                "the address needs its token: take it as `mlx-empire open` printed it", 403
            )
        rest = request.url.remove_query_params(WORD).query
        here = "/" + request.url.path.lstrip("/")  # two slashes would lead to another machine
        answer = RedirectResponse(f"{here}?{rest}" if rest else here, 303)
        answer.set_cookie(COOKIE, self._token, max_age=DAYS * 86400, httponly=True, samesite="strict")
        return answer

    def _is_token(self, word: str | None) -> bool:
        return (
            self._token is not None
            and word is not None
            and secrets.compare_digest(word.encode(), self._token.encode())
        )
