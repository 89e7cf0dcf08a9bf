"""Decides which characters of a rendered conversation are the assistant's; only here are templates read.

mlx-lm's ChatDataset gives one offset per row, measured in tokens of a shorter rendering: it masks every
assistant turn but the last, and is wrong where a template renders earlier turns differently or where tokens
merge across the boundary. So the template is used through mlx-lm's tokenizer, but the spans are found here,
in characters.
"""

from collections.abc import Callable, Sequence
from typing import Any

from mlx_empire.data.files import RawRow
from mlx_empire.errors import UserError

Messages = list[dict[str, Any]]
Render = Callable[[Messages, bool], str]
Span = tuple[int, int]

PROBE = "\ue000"  # a private-use character: no conversation begins or ends with it

# Some templates print today's date (strftime_now). Then the tokens would depend on the day, and a run that
# resumes tomorrow would read other data, so their clock is stopped; a macro, because transformers passes no
# functions.
FIXED_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    "{{ format | replace('%Y', '2026') | replace('%m', '01') | replace('%d', '01') | replace('%b', 'Jan')"
    " | replace('%B', 'January') | replace('%A', 'Thursday') | replace('%H', '00') | replace('%M', '00')"
    " | replace('%S', '00') }}"
    "{%- endmacro -%}"
)


def render_chat(
    tokenizer: Any, row: RawRow, messages: Messages, mask_prompt: bool
) -> tuple[str, list[Span] | None]:
    """Render a conversation with the tokenizer's template.

    Returns the text and the character spans that are training targets: each assistant turn with its
    end-of-turn marker, or None (everything) without `mask_prompt`. Errors: UserError when the template
    refuses the conversation.
    """
    render = _renderer(tokenizer, row.value.get("tools"))
    try:
        full = render(messages, False)
    except Exception as error:  # a template may raise anything, its own messages included
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{row.where}: the tokenizer's chat template refuses this conversation ({reason}); "
            "correct the row"
        ) from error
    if not mask_prompt:
        return full, None
    spans: list[Span] = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            span = _assistant_span(render, messages, turn, full)
            if span is None or (spans and span[0] < spans[-1][1]):
                raise UserError(
                    f"{row.where}: message {turn + 1}: the chat template does not show where this assistant "
                    "turn begins and ends; set data.mask_prompt: false or give each turn a row of its own"
                )
            spans.append(span)
    return full, spans


def _renderer(tokenizer: Any, tools: list[dict[str, Any]] | None) -> Render:
    options: dict[str, Any] = {"tools": tools, "tokenize": False}
    template = tokenizer.get_chat_template(tools=tools) if tokenizer.chat_template else ""
    if "strftime_now" in template:
        options["chat_template"] = FIXED_CLOCK + template

    def render(messages: Messages, generation_prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt, **options)
        )

    return render


def _assistant_span(render: Render, messages: Messages, turn: int, full: str) -> Span | None:
    """The characters of `full` that the model writes in `turn`, or None where they cannot be found.

    Usually the rendering up to the turn, with the generation prompt, is a prefix of the rendering through the
    turn, which is a prefix of the whole. Where a template renders the past differently (it drops earlier
    reasoning, or its generation prompt opens a thought), the turn is found by changing its content and
    looking at what moves.
    """
    before = _attempt(render, messages[:turn], True)
    through = full if turn + 1 == len(messages) else _attempt(render, messages[: turn + 1], False)
    if before is not None and through is not None and through.startswith(before) and full.startswith(through):
        return len(before), len(through)

    content = _moving_part(render, messages, turn, full)
    alone = None if through is None else _moving_part(render, messages[: turn + 1], turn, through)
    if content is None or alone is None or through is None:
        return None
    start, end = content
    if before is not None and full.startswith(before):
        start = min(start, len(before))
    closing = shared_prefix(through[alone[1] :], full[end:])
    return start, end + closing


def _moving_part(render: Render, messages: Messages, turn: int, text: str) -> Span | None:
    """The part of `text`, the rendering of `messages`, that depends on the content of `turn`."""
    probed = _attempt(
        render, [*messages[:turn], {**messages[turn], "content": PROBE}, *messages[turn + 1 :]], False
    )
    if probed is None or PROBE not in probed:
        return None
    start = shared_prefix(text, probed)
    shorter = min(len(text), len(probed)) - start
    tail = shared_prefix(text[::-1][:shorter], probed[::-1][:shorter])
    return start, len(text) - tail


def shared_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many leading items two sequences have in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _attempt(render: Render, messages: Messages, generation_prompt: bool) -> str | None:
    """A rendering of a part of a conversation, or None: templates may refuse parts (no message at all)."""
    try:
        return render(messages, generation_prompt)
    except Exception:
        return None
