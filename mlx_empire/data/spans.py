"""Decides which characters of a rendered conversation a turn's author wrote, by what moves as its text changes.

mlx-lm's ChatDataset gives one offset per row, measured in tokens of a shorter rendering: it masks every
assistant turn but the last, and is wrong where a template renders earlier turns differently or where tokens
merge across the boundary. So the spans are found here, in characters.
"""

from collections.abc import Callable, Sequence
from typing import Any

from mlx_empire.data.files import RawRow
from mlx_empire.data.messages import THOUGHTS, Messages
from mlx_empire.data.tools import PROBE, has_calls, probed
from mlx_empire.errors import UserError

Render = Callable[[Messages, bool], str]  # messages, and whether the generation prompt follows
Span = tuple[int, int]


def assistant_spans(
    render: Render, row: RawRow, messages: Messages, turns: Sequence[int], full: str
) -> list[Span]:
    """The characters of `full` that the assistant wrote in each of `turns`. Errors: UserError where they are hidden."""
    spans: list[Span] = []
    for turn in turns:
        span = _assistant_span(render, messages, turn, full)
        if span is None or (spans and span[0] < spans[-1][1]):
            raise UserError(
                f"{row.where}: message {turn + 1}: the chat template does not show where this assistant "
                "turn begins and ends; set data.mask_prompt: false or give each turn a row of its own"
            )
        spans.append(span)
    return spans


def _assistant_span(render: Render, messages: Messages, turn: int, full: str) -> Span | None:
    """The characters of `full` that the model writes in `turn`, or None where they cannot be found.

    Usually the rendering up to the turn, with the generation prompt, is a prefix of the rendering through the
    turn, which is a prefix of the whole. Where a template renders the past differently (it drops earlier
    reasoning, or its generation prompt opens a thought), the turn is found by changing its content and
    looking at what moves.
    """
    before = attempt(render, messages[:turn], True)
    through = full if turn + 1 == len(messages) else attempt(render, messages[: turn + 1], False)
    if before is not None and through is not None and through.startswith(before) and full.startswith(through):
        return len(before), len(through)

    content = moving_part(render, messages, turn, full)
    alone = None if through is None else moving_part(render, messages[: turn + 1], turn, through)
    if content is None or alone is None or through is None:
        return None
    start, end = content
    header = _header_end(render, messages, turn, full, start)
    if before is not None and full.startswith(before):
        start = min(start, len(before))
    elif header is not None:
        start = header
    elif has_calls(messages[turn]):
        opening = _call_opening(render, messages, turn, full, start)
        if opening is None:
            return None
        start -= opening
    closing = shared_prefix(through[alone[1] :], full[end:])
    return start, end + closing


def _call_opening(render: Render, messages: Messages, turn: int, full: str, start: int) -> int | None:
    """How many characters before `start`, where its arguments or its thought move, a turn with calls begins: what opens
    the call is the model's too. It is where the rendering departs from one with a plain text in the turn's place."""
    plain = {"role": "assistant", "content": PROBE}
    other = attempt(render, [*messages[:turn], plain, *messages[turn + 1 :]], False)
    if other is not None:
        return max(0, start - shared_prefix(full, other))
    # A result without a call is refused (Mistral): the same, where the turn is the last, without its thought.
    last = {key: value for key, value in messages[turn].items() if key not in THOUGHTS}
    through = attempt(render, [*messages[:turn], last], False)
    alone = None if through is None else moving_part(render, [*messages[:turn], last], turn, through)
    other = attempt(render, [*messages[:turn], plain], False)
    if through is None or alone is None or other is None:
        return None
    opening = through[shared_prefix(through, other) : alone[0]]
    return len(opening) if full[:start].endswith(opening) else None


def _header_end(render: Render, messages: Messages, turn: int, full: str, start: int) -> int | None:
    """Where the generation prompt ends between the message before `turn` and `start`, if it stands there."""
    bare, before = (attempt(render, messages[:turn], prompts) for prompts in (False, True))
    if turn == 0 or bare is None or before is None or not before.startswith(bare):
        return None
    header = before[len(bare) :]
    earlier = moving_part(render, messages, turn - 1, full)
    found = full.rfind(header, earlier[1], start) if header and earlier else -1
    return None if found < 0 else found + len(header)


def moving_part(render: Render, messages: Messages, turn: int, text: str) -> Span | None:
    """The part of `text`, the rendering of `messages`, that depends on what the author of `turn` wrote."""
    changed = [*messages[:turn], probed(messages[turn]), *messages[turn + 1 :]]
    other = attempt(render, changed, False)
    if other is None or PROBE not in other:
        return None
    start = shared_prefix(text, other)
    shorter = min(len(text), len(other)) - start
    tail = shared_prefix(text[::-1][:shorter], other[::-1][:shorter])
    return start, len(text) - tail


def shared_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many leading items two sequences have in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def attempt(render: Render, messages: Messages, generation_prompt: bool) -> str | None:
    """A rendering of a part of a conversation, or None: templates may refuse parts (no message at all)."""
    try:
        return render(messages, generation_prompt)
    except Exception:
        return None
