"""Decides in which form tool calls and lists of parts reach a chat template, and refuses what it does not print.

OpenAI's `arguments` are a JSON string. Most templates print an object with `tojson`, which would escape a string a
second time; a few join a string as it is. A content that is a list of parts
comes out as Python writes it where a template wants a string. What a template does is seen, not guessed: every name,
argument, result and part is replaced by a mark, and the marks must come out of the rendering. Each form is tried:
objects first, then strings; lists first, then their texts joined.
"""

import json
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from mlx_empire.data.messages import ROLE_UNLESS_KNOWN, THOUGHTS, Message, Messages
from mlx_empire.errors import UserError

Change = Callable[[dict[str, Any]], dict[str, Any]]

# A private-use character: no conversation begins or ends with it, JSON keeps it, and Python's repr, which a template
# prints for an object that it does not convert, escapes it.
PROBE = "\ue000"
RESULT_ROLES = ("tool", *(role for role, standard in ROLE_UNLESS_KNOWN.items() if standard == "tool"))


def has_calls(message: Message) -> bool:
    """Whether the message calls functions."""
    return bool(message.get("tool_calls"))


def uses_tools(messages: Messages) -> bool:
    """Whether a message calls functions or has a result of one."""
    return any(has_calls(message) or message["role"] in RESULT_ROLES for message in messages)


def in_printed_form(attempt: Callable[[Messages], str | None], messages: Messages, where: str) -> Messages:
    """`messages` with the arguments of their calls, and contents that are lists, in the form that the template prints.

    attempt: renders messages, or gives None where the template refuses them. Errors: UserError naming `where` and the
    message, for a call that is no call and for what the template does not print.
    """
    lists = any(isinstance(message.get("content"), list) for message in messages)
    if not lists and not uses_tools(messages):
        return messages
    try:
        objects = [_with_objects(message, f"{where}: message {n}") for n, message in enumerate(messages, 1)]
        strings = [map_calls(message, _with_string) for message in messages]
        forms = [objects]
        if any(map(has_calls, messages)):
            forms += [strings, [_nested(message) for message in objects]]
        forms += [[{**m, "content": m.get("content") or ""} for m in form] for form in forms]
        if lists:
            forms += [[_joined(message) for message in form] for form in forms]
        lost = []
        for form in forms + [as_parts(form) for form in forms]:
            marks = _Marks()
            marked = [marks.put_in(message, number) for number, message in enumerate(form, 1)]
            text = attempt(marked)
            if text is not None:
                lost.append(marks.lost_in(text))
                if lost[-1] is None:
                    return form
    except RecursionError:
        raise UserError(f"{where}: tool call arguments are nested too deeply; simplify the row") from None
    if lost:
        raise UserError(f"{where}: {lost[0]}")
    return forms[-1]  # refused in every form: the rendering of the row itself says why


def probed(message: Message) -> Message:
    """The message with PROBE for what its author wrote: content, thought, arguments. Names of functions stay: some
    templates print them once more, above the result."""

    def change(function: dict[str, Any]) -> dict[str, Any]:
        return {**function, "arguments": _like(function["arguments"], {PROBE: PROBE})}

    changed = map_calls(message, change)
    if not has_calls(message) or _text(message):
        changed["content"] = rewritten(message.get("content"), lambda: PROBE)
    changed.update((key, PROBE) for key in THOUGHTS if message.get(key))
    return changed


def as_parts(messages: Messages) -> Messages:
    """`messages` with each content that is a string as a list of one part, which is what some templates read."""
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
        for m in messages
    ]


def map_calls(message: Message, change: Change) -> Message:
    """A copy whose functions {name, arguments} went through `change`: nested in a call, or flat."""
    changed = dict(message)
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            {**call, "function": change(call["function"])} if call.get("function") else change(call)
            for call in message["tool_calls"]
        ]
    return changed


def _nested(message: Message) -> Message:
    """A copy whose flat calls are nested, as OpenAI has them."""
    if not has_calls(message):
        return message
    calls = []
    for call in message["tool_calls"]:
        if not call.get("function"):
            function = {key: call[key] for key in ("name", "arguments")}
            rest = {key: value for key, value in call.items() if key not in function}
            call = {**rest, "type": "function", "function": function}
        calls.append(call)
    return {**message, "tool_calls": calls}


def _joined(message: Message) -> Message:
    """A copy whose content, where it is a list of texts, is one string."""
    content = message.get("content")
    if not isinstance(content, list) or not all(isinstance(part.get("text"), str) for part in content):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


def _with_objects(message: Message, where: str) -> Message:
    """The message with arguments as objects. Errors: UserError where a call is not {name, arguments}."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: 'tool_calls' must be a list of {{function: {{name, arguments}}}} objects")

    def change(function: Any) -> dict[str, Any]:
        if (
            not isinstance(function, dict)
            or not function.get("name")
            or not isinstance(function["name"], str)
        ):
            raise UserError(f"{where}: a tool call has no function name; write {{name, arguments}}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise UserError(
                    f"{where}: the arguments of {function['name']!r:.40} are not JSON ({error}); "
                    "write an object, or a string that holds one"
                ) from error
        if not isinstance(arguments, dict):
            kind = "missing" if arguments is None else f"a {type(arguments).__name__}"
            raise UserError(
                f"{where}: the arguments of {function['name']!r:.40} are {kind}, not an object; write {{}} for none"
            )
        return {**function, "arguments": arguments}

    return map_calls(message, change)


def _with_string(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    as_string = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**function, "arguments": as_string}


def _like(model: Any, arguments: dict[str, Any]) -> Any:
    """`arguments` as a JSON string where `model` is a string."""
    return json.dumps(arguments, ensure_ascii=False) if isinstance(model, str) else arguments


def _text(message: Message) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content)


def rewritten(content: Any, new: Callable[[], str]) -> Any:
    """A new text in place of `content`, or of each text in its list of parts."""
    if not isinstance(content, list):
        return new()
    changed = []
    for part in content:
        key = "text" if part.get("text") is not None else "thinking"
        changed.append({**part, key: rewritten(part[key], new)})
    return changed


class _Marks:
    """Marks in place of names, arguments and results, and what each stands for."""

    def __init__(self) -> None:
        self._new: Iterator[str] = (f"{PROBE}{number}{PROBE}" for number in count())
        self._expected: list[
            tuple[str, str]
        ] = []  # a mark, and the sentence for the user if it is not printed
        self._escaped: list[
            tuple[str, str, str]
        ] = []  # two marks with a quotation mark between, and the sentence

    def put_in(self, message: Message, number: int) -> Message:
        """The message with marks; `number` is its place, from 1."""
        if has_calls(message):
            changed = map_calls(message, lambda function: self._function(function, number))
            for call, given in zip(changed["tool_calls"], message["tool_calls"], strict=True):
                name, mark = ((c.get("function") or c)["name"] for c in (given, call))
                if name in str(given.get("id")):  # Kimi K2 prints this alone: functions.NAME:0
                    call["id"] = given["id"].replace(name, mark)
            if _text(message):
                sentence = (
                    f"message {number}: the chat template prints the tool call and drops the content beside it; "
                    "remove the content or give it a message of its own"
                )
                changed["content"] = rewritten(message["content"], lambda: self._mark(sentence))
            return changed
        if message["role"] in RESULT_ROLES:
            sentence = (
                f"message {number}: the chat template does not print this result (role {message['role']}); "
                "use the role that the template knows, or a model whose template knows tools"
            )
            return {**message, "content": rewritten(message.get("content"), lambda: self._mark(sentence))}
        if isinstance(message.get("content"), list):
            sentence = (
                f"message {number}: the chat template does not print this list of parts; write it as a string"
            )
            return {**message, "content": rewritten(message["content"], lambda: self._mark(sentence))}
        return message

    def lost_in(self, text: str) -> str | None:
        """The sentence for the first thing that `text` does not show, or shows with doubled escapes."""
        for mark, sentence in self._expected:
            if mark not in text:
                return sentence
        for first, second, sentence in self._escaped:
            between = text[text.index(first) + len(first) :].partition(second)[0]
            if "\\\\" in between:
                return sentence
        return None

    def _mark(self, sentence: str) -> str:
        mark = next(self._new)
        self._expected.append((mark, sentence))
        return mark

    def _function(self, function: dict[str, Any], number: int) -> dict[str, Any]:
        sentence = (
            f"message {number}: the chat template does not print the call of {function['name']!r:.40} whole "
            "(its name, and its arguments as JSON or one by one), so the answer would be learnt without it; "
            "use a model whose template knows tools, or write the call into content as the model expects it"
        )
        name, first, second = (self._mark(sentence) for _ in range(3))
        given = function["arguments"]
        values = json.loads(given) if isinstance(given, str) else given
        arguments = {**self._leaves(values, sentence), self._mark(sentence): f'{first}"{second}'}
        if isinstance(given, str):
            self._escaped.append((first, second, sentence))
        return {**function, "name": name, "arguments": _like(given, arguments)}

    def _leaves(self, value: Any, sentence: str) -> Any:
        if isinstance(value, dict):
            return {key: self._leaves(item, sentence) for key, item in value.items()}
        if isinstance(value, list):
            return [self._leaves(item, sentence) for item in value]
        return self._mark(sentence) if isinstance(value, str) else value
