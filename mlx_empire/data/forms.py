"""Decides under which role, name and form the parts of a conversation reach a chat template.

What a template knows is seen, not guessed: a role that it knows is rendered otherwise than one that nobody knows, and
a thought that it prints shows in the rendering. Tool calls and their results: `data/tools.py`.
"""

from collections.abc import Callable

from mlx_empire.data.messages import ROLE_UNLESS_KNOWN, STANDARD_ROLES, THOUGHTS, Message, Messages
from mlx_empire.data.tools import PROBE
from mlx_empire.errors import UserError

Attempt = Callable[[Messages], str | None]  # renders messages; None where the template refuses them

NOBODY = "\ue002"  # a role that no template knows; a private-use character has no capital letter


def settled_roles(attempt: Attempt, messages: Messages, where: str) -> Messages:
    """`messages` with roles that the template knows, or standard ones. Errors: UserError for a role that is neither."""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role in STANDARD_ROLES or knows_role(attempt, messages, role):
            continue
        if role not in ROLE_UNLESS_KNOWN:
            raise UserError(
                f"{where}: message {number}: role {role!r:.40} is not known, nor to the chat template; "
                "use system, user, assistant or tool"
            )
        messages = _renamed(messages, role, ROLE_UNLESS_KNOWN[role])
    return messages


def knows_role(attempt: Attempt, messages: Messages, role: str) -> bool:
    """Whether the template renders `role` otherwise than by printing its name, as it would any."""
    text = attempt(messages)
    if text is None:
        return False
    other = attempt(_renamed(messages, role, NOBODY))
    return other is None or text.casefold() != other.casefold().replace(NOBODY, role)


def _renamed(messages: Messages, role: str, new: str) -> Messages:
    return [{**message, "role": new} if message["role"] == role else message for message in messages]


def thought_key(message: Message) -> str | None:
    """The name under which the message has a thought."""
    return next((key for key in THOUGHTS if message.get(key)), None)


def printed_thoughts(attempt: Attempt, messages: Messages, where: str) -> tuple[Messages, int]:
    """`messages` with thoughts under the name that the template prints, and how many of them it does not show.

    Templates drop the thoughts before the last question on purpose; so one must show where its turn is the last.
    Errors: UserError where none ever shows.
    """
    turns = [turn for turn, message in enumerate(messages) if thought_key(message)]
    if not turns:
        return messages, 0
    given = thought_key(messages[turns[-1]])
    for key in sorted(THOUGHTS, key=lambda name: name != given):
        named = [_with_thought(message, key, lambda thought: thought) for message in messages]
        for turn in reversed(turns):
            text = attempt([*named[:turn], _with_thought(named[turn], key, lambda _: PROBE)])
            if text is not None and PROBE in text:
                marks = {number: f"{PROBE}{number}{PROBE}" for number in turns}
                marked = [{**m, key: marks[n]} if n in marks else m for n, m in enumerate(named)]
                whole = attempt(marked) or ""
                return named, sum(mark not in whole for mark in marks.values())
    raise UserError(
        f"{where}: message {turns[-1] + 1}: the chat template does not print {given!r}, so the answer would be learnt "
        "without it; write the thought into content as the model expects it, or remove it"
    )


def _with_thought(message: Message, key: str, change: Callable[[str], str]) -> Message:
    """A copy with its thought, if it has one, changed and under the name `key`."""
    had = thought_key(message)
    if had is None:
        return message
    return {**{name: value for name, value in message.items() if name != had}, key: change(message[had])}
