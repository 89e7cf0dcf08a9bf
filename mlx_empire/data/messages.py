"""Decides what the keys and roles of a conversation mean, and gives it OpenAI's names, which chat templates read.

What other tools write is mapped where it has one meaning (`human`, `function_call`, `train`); what cannot be followed
(a weight of 0.5, an image, a training flag inside a text) is refused by its key, never dropped. What depends on the
template (whether it knows a role, which name it has for a thought) is decided in `data/chat.py` and `data/forms.py`.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mlx_empire.data.files import RawRow
from mlx_empire.errors import UserError

Message = dict[str, Any]
Messages = list[Message]

STANDARD_ROLES = ("system", "user", "assistant", "tool")
SAME_ROLE = {"human": "user"} | dict.fromkeys(
    ("gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant"
)
# Some templates know these roles themselves; for the others they become the standard one.
ROLE_UNLESS_KNOWN = {"developer": "system"} | dict.fromkeys(
    ("function", "observation", "ipython", "tool_response"), "tool"
)
CALL_ROLES = ("function_call", "tool_call")
# Names of the thought before an answer: DeepSeek and Qwen; OpenRouter and vLLM; gpt-oss.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Whether a message is learnt, for OpenAI and Mistral; axolotl; ms-swift and XTuner; others. torchtune: the opposite.
FLAGS = ("weight", "train", "training", "loss", "trainable", "train_on_turn", "loss_mask")
OPPOSITE_FLAG = "masked"
SYSTEM = ("system", "system_prompt")  # what some tools put beside the messages
FLAGS_WITHIN = ("train_detail", "training_detail", "loss_scale")
NO_TEXT = "'content' must be a string"


@dataclass(frozen=True)
class Conversation:
    """Messages under standard names, which of them are learnt (assistant's ones alone), whether the row says so
    itself, and the schemas of the tools."""

    messages: Messages
    learnt: tuple[bool, ...]
    flagged: bool
    tools: list[dict[str, Any]] | None


def read_conversation(row: RawRow, messages: Any) -> Conversation:
    """`messages`, a part of `row`, under standard names. Errors: UserError naming file, line, message and key."""
    _check_row_keys(row)
    if not isinstance(messages, list) or not messages:
        remedy = "write a list of {role, content} objects"
        raise UserError(f"{row.where}: 'messages' is not a list of one message or more; {remedy}")
    read, learnt, flagged = [], [], False
    for number, message in enumerate(messages, start=1):
        where = f"{row.where}: message {number}"
        if isinstance(message, dict) and "from" in message and "value" in message:
            raise UserError(
                f"{where} has 'from' and 'value'; `{row.converting}` writes them as role and content"
            )
        standard = _standard(where, message)
        flag = _pop_flag(where, standard)
        if flag and standard["role"] != "assistant":
            raise UserError(
                f"{where} ({standard['role']}) asks to be learnt; only what the assistant writes is: "
                "remove that key, or train on everything with data.mask_prompt: false"
            )
        flagged |= flag is False
        read.append(standard)
        learnt.append(standard["role"] == "assistant" and flag is not False)
    return Conversation(read, tuple(learnt), flagged, _tools(row))


def standard_role(role: str) -> str:
    """The standard name of a role that has one whatever the template; any other as it is, in small letters."""
    role = role.strip().casefold()
    return SAME_ROLE.get(role, role)


def parts_of(content: Any) -> Iterator[dict[str, Any]]:
    """The parts of a content that is a list, those inside a thinking part included."""
    for part in content if isinstance(content, list) else ():
        yield part
        yield from parts_of(part.get("thinking"))


def _standard(where: str, message: Any) -> Message:
    """A copy without empty keys, under the standard names of role and call. Errors: UserError."""
    if not isinstance(message, dict):
        kind = type(message).__name__
        raise UserError(f"{where} is a {kind}; it must be an object with role and content")
    found = {key: value for key, value in message.items() if value is not None or key == "content"}
    role = found.get("role")
    if not isinstance(role, str) or not role.strip():
        raise UserError(f"{where} has no role; use system, user, assistant or tool")
    found["role"] = role = standard_role(role)
    if role in CALL_ROLES:
        raise UserError(f"{where}: role {role!r}; write role assistant with tool_calls: [{{function: ...}}]")
    if "tool_responses" in found:
        raise UserError(
            f"{where}: 'tool_responses' are not the assistant's own text; write each as a message of role tool "
            "{name, content} after the call, and the answer as one more assistant message"
        )
    if "function_call" in found:
        if found.get("tool_calls"):
            raise UserError(f"{where} has both 'function_call' and 'tool_calls'; keep the second")
        found["tool_calls"] = [{"type": "function", "function": found.pop("function_call")}]
    if found.get("tool_calls") and role != "assistant":
        raise UserError(f"{where} ({role}) has 'tool_calls'; only role assistant calls tools")
    _check_content(f"{where} ({role})", found)
    _one_thought(where, found)
    return found


def _check_content(where: str, message: Message) -> None:
    """Raise UserError unless the content is text, a list of parts of text, or None beside something else."""
    content = message.get("content")
    if content is None and any(message.get(key) for key in ("tool_calls", *THOUGHTS)):
        return
    if not isinstance(content, str | list):
        raise UserError(f"{where} has no text; {NO_TEXT}")
    if isinstance(content, list) and not all(isinstance(part, dict) for part in content):
        raise UserError(
            f"{where} has a list that holds other things than parts {{type: text, text: ...}}; {NO_TEXT}"
        )
    for part in parts_of(content):
        kind = part.get("type", "text")
        key = next((key for key in (*FLAGS, OPPOSITE_FLAG) if part.get(key) is not None), None)
        if key:
            raise UserError(
                f"{where}: a part with {key!r}: a message is learnt whole or not; give it one flag for all"
            )
        if kind not in ("text", "thinking") or not isinstance(part.get(kind), str | list):
            raise UserError(
                f"{where}: a part of type {kind!r:.40}; this trains on text: write {{type: text, text: ...}}"
            )


def _one_thought(where: str, message: Message) -> None:
    """Leave one name of the thought. Errors: UserError for several thoughts, or one that is no string."""
    names = [name for name in THOUGHTS if message.get(name)]
    for name in set(THOUGHTS) - set(names[:1]):
        if name in names and message[name] != message[names[0]]:
            raise UserError(f"{where} has both {names[0]!r} and {name!r}, which differ; keep one")
        message.pop(name, None)
    if names and not isinstance(message[names[0]], str):
        kind = type(message[names[0]]).__name__
        raise UserError(f"{where}: {names[0]!r} is a {kind}; it must be a string")
    if names and message["role"] != "assistant":
        raise UserError(
            f"{where} ({message['role']}) has {names[0]!r}; only the assistant's is learnt: remove it"
        )


def _pop_flag(where: str, message: Message) -> bool | None:
    """Whether the message says that it is learnt (None: it says nothing), and take its flags out. Errors: UserError."""
    for key in FLAGS_WITHIN:
        if key in message:
            raise UserError(f"{where}: {key!r}: a message is learnt whole or not; use 'weight' 1 or 0")
    said = {}
    for key in (*FLAGS, OPPOSITE_FLAG):
        if key in message:
            value = message.pop(key)
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise UserError(
                    f"{where}: {key!r} is {value!r:.40}; a message is learnt (1) or not (0): write one of them"
                )
            said[key] = bool(value) is not (key == OPPOSITE_FLAG)
    if len(set(said.values())) > 1:
        raise UserError(f"{where}: {' and '.join(map(repr, said))} disagree; keep one of them")
    return next(iter(said.values()), None)


def _check_row_keys(row: RawRow) -> None:
    """Raise UserError for what is said beside the messages and changes what is learnt."""
    weight = row.value.get("weight")
    if isinstance(weight, int | float) and weight != 1:
        raise UserError(
            f"{row.where}: 'weight' is {weight}; all rows count alike: remove the key, or remove or repeat the row"
        )
    for key in SYSTEM:
        if row.value.get(key) and not _begins_with_it(row, key):
            raise UserError(
                f"{row.where}: {key!r} beside the messages; make it the first message, of role system"
            )
    if row.value.get("chat_template_kwargs"):
        raise UserError(
            f"{row.where}: 'chat_template_kwargs': rows are rendered without options; write what they say into the "
            "chat template, or remove the key"
        )


def _begins_with_it(row: RawRow, key: str) -> bool:
    """Whether what stands beside the messages only repeats the first of them, as the records of some tools do."""
    first = next(iter(row.value["messages"]), None) if isinstance(row.value.get("messages"), list) else None
    return (
        isinstance(first, dict) and first.get("role") == "system" and first.get("content") == row.value[key]
    )


def _tools(row: RawRow) -> list[dict[str, Any]] | None:
    """The schemas of `tools`, or of `functions` as OpenAI had them before. Errors: UserError."""
    tools, functions = row.value.get("tools"), row.value.get("functions")
    if isinstance(tools, str) and tools.strip():
        with suppress(ValueError, RecursionError):  # the last line says what it must be
            tools = json.loads(tools)
    if functions and not tools:
        tools = functions
        if isinstance(tools, list):
            tools = [{"type": "function", "function": function} for function in tools]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"{row.where}: 'tools' must be a list of JSON schemas; remove it or correct it")
    return tools
