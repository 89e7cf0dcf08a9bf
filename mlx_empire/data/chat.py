"""Decides which characters of a rendered conversation are the assistant's; only here are templates read.

- A target is all that the assistant writes in a turn, with what ends it: the turn's closing or, where that holds
  no end-of-sequence token, such a token at the head of what follows. After the last turn it is appended. Turns
  for which neither is found are counted, and the user is told (`Remarks`).
- A turn that the row says is not to be learnt (`weight: 0`) is read like any other, and is no target.
- What the template reads, and under which names, is seen (`data/messages.py`, `forms.py`, `tools.py`); contents, tool
  calls and results that it does not print are refused. Rows whose `tools` are not printed, thoughts that it drops and
  keys that nothing reads are counted, and the user is told.

Which token ends a turn: `data/stops.py`. An answer that says nothing, or that spells such a token out, teaches to stop
there; it is counted, and the user is told.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mlx_empire.data.files import RawRow
from mlx_empire.data.forms import knows_role, printed_thoughts, settled_roles, thought_key
from mlx_empire.data.messages import Conversation, Messages, read_conversation
from mlx_empire.data.spans import Render, Span, assistant_spans, attempt, moving_part, shared_prefix
from mlx_empire.data.stops import Stops
from mlx_empire.data.tools import PROBE, as_parts, in_printed_form, probed, rewritten, uses_tools
from mlx_empire.errors import UserError
from mlx_empire.recipe.text import words_of

NEXT = "\ue001"  # as PROBE, for the message that is put after a conversation
# Keys of messages that most templates read or that are no text: nothing is lost where one does not.
READ_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "id")

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


@dataclass
class Remarks:
    """What the user is told about the conversations of a set: assistant turns that are learnt, those of them that
    say nothing, and that spell an end out; of those whose end is looked at (`ends`; without `mask_prompt` of a row's
    last one alone) those that nothing ends; rows whose `tools` the template does not print, thoughts that it drops,
    keys that nothing reads.
    """

    turns: int = 0
    ends: int = 0
    endless: int = 0
    silent: int = 0
    ending_within: int = 0
    tools_unseen: int = 0
    thoughts_unseen: int = 0
    unread: Counter[str] = field(default_factory=Counter)

    def add(self, others: "Remarks") -> None:
        """What was found in more conversations."""
        self.turns += others.turns
        self.ends += others.ends
        self.endless += others.endless
        self.silent += others.silent
        self.ending_within += others.ending_within
        self.tools_unseen += others.tools_unseen
        self.thoughts_unseen += others.thoughts_unseen
        self.unread.update(others.unread)

    def sentences(self, tokenizer: Any) -> list[str]:
        """One line for each thing that is not as it should be."""
        told = []
        if self.endless:
            ends = ", ".join(Stops.of(tokenizer).ends) or "it names none"
            told.append(
                f"WARNING: {self.endless} of {self.ends} assistant turns end without an end-of-sequence token "
                f"({ends}): the chat template of {tokenizer.name_or_path} writes none in or after them, so the model "
                "does not learn to stop there; let it write one after each turn, or add the token that it does write "
                "to eos_token_id in generation_config.json"
            )
        if self.silent:
            told.append(
                f"WARNING: {self.silent} of {self.turns} assistant turns say nothing, so the model learns to stop "
                "before it says anything; remove these rows, or give the turns weight 0"
            )
        if self.ending_within:
            told.append(
                f"WARNING: {self.ending_within} of {self.turns} assistant turns spell an end-of-sequence token "
                f"({', '.join(Stops.of(tokenizer).ends)}) out in what they say, so the model learns to stop in their "
                "middle and to go on after it; remove it from their content"
            )
        if self.tools_unseen:
            told.append(
                f"WARNING: the chat template of {tokenizer.name_or_path} does not print the 'tools' of "
                f"{self.tools_unseen} rows, so their answers are learnt without them; describe them in a system "
                "message, or use a template that prints them"
            )
        if self.thoughts_unseen:
            told.append(
                f"WARNING: the chat template of {tokenizer.name_or_path} drops {self.thoughts_unseen} thoughts (most "
                "print none before the last question), so they are not learnt; give each such turn a row of its own"
            )
        if self.unread:
            keys = ", ".join(f"{key!r} ({count})" for key, count in self.unread.most_common(8))
            told.append(f"WARNING: keys of messages that nothing reads, the chat template included: {keys}")
        return told


class ChatReader:
    """Renders conversations with the template of one tokenizer, and counts what the user should know of."""

    def __init__(self, tokenizer: Any, remarks: Remarks | None = None) -> None:
        self.remarks = remarks or Remarks()
        self._tokenizer, self._stops = tokenizer, Stops.of(tokenizer)

    def render(self, row: RawRow, messages: Messages, mask_prompt: bool) -> tuple[str, list[Span] | None]:
        """The text of a conversation and the character spans that are training targets: each assistant turn that is
        to be learnt with what ends it, or None (everything) without `mask_prompt`. Errors: UserError when the template
        refuses the conversation, or does not print a part of it."""
        conversation = read_conversation(row, messages)
        if conversation.flagged and not mask_prompt:
            raise UserError(
                f"{row.where}: messages that are not to be learnt (weight 0) need data.mask_prompt: true"
            )
        render, messages, full = self._full(row, conversation, False)
        turns = [turn for turn, wanted in enumerate(conversation.learnt) if wanted]
        ends_it = conversation.learnt[-1]
        if mask_prompt:
            spans, ending = assistant_spans(render, row, messages, turns, full), turns
        else:
            spans, ending = [(0, len(full))][:ends_it], turns[-1:]
        for number, (start, end) in enumerate(spans):
            end, stop = self._stops.whole(full, end), ""
            closed = self._stops.closed(full[start:end])
            if closed is None:
                closed = self._closed_before_a_header(render, messages, ending[number], full, start, end)
            if closed is not None:
                end = start + closed if mask_prompt else end
            else:
                if ends_it and number + 1 == len(spans):
                    stop = self._next_opening(render, messages)
                    full += stop
                else:
                    stop = self._stops.opening(full[end:])
                self.remarks.endless += not stop
            spans[number] = start, end + len(stop)
        self.remarks.ends += len(spans)
        self._count([messages[turn] for turn in turns])
        return full, spans if mask_prompt else None

    def _count(self, learnt: Messages) -> None:
        self.remarks.turns += len(learnt)
        for message in learnt:
            said = _said(message.get("content"))
            self.remarks.silent += not (said.strip() or message.get("tool_calls") or thought_key(message))
            self.remarks.ending_within += any(end in said for end in self._stops.ends)

    def _closed_before_a_header(
        self, render: Render, messages: Messages, turn: int, full: str, start: int, end: int
    ) -> int | None:
        """As `Stops.closed`, where text comes after the end: some templates open the next turn without being asked."""
        said = moving_part(render, messages, turn, full)
        if said is None or not start <= said[1] <= end:
            return None
        ended = self._stops.ended(full[said[1] : end])
        return None if ended is None else said[1] - start + ended

    def prompt(self, row: RawRow, messages: Messages) -> str:
        """The text after which the assistant answers. Errors: as `render`."""
        return self._full(row, read_conversation(row, messages), True)[2]

    def _full(
        self, row: RawRow, conversation: Conversation, generation_prompt: bool
    ) -> tuple[Render, Messages, str]:
        """The function that renders, the messages in the form that the template prints, and their rendering."""
        tools = conversation.tools
        template = _template(self._tokenizer, row, tools)
        render = _renderer(self._tokenizer, template, tools)
        messages = self._in_its_form(row, render, template, conversation.messages)
        messages, full = self._rendered(row, render, messages, generation_prompt)
        if tools and full == attempt(_renderer(self._tokenizer, template, None), messages, generation_prompt):
            self.remarks.tools_unseen += 1
        return render, messages, full

    def _rendered(
        self, row: RawRow, render: Render, messages: Messages, generation_prompt: bool
    ) -> tuple[Messages, str]:
        """`messages` and their rendering, as lists of parts where the template reads no strings. Errors: UserError."""
        refusal = None
        try:
            full = render(messages, generation_prompt)
        except Exception as error:  # a template may raise anything, its own messages included
            refusal = error
        hidden = None if refusal else _hidden(render, messages, full)
        if (refusal or hidden is not None) and not uses_tools(
            messages
        ):  # for tools, `in_printed_form` has tried it
            parts = as_parts(messages)
            other = attempt(render, parts, generation_prompt)
            if other is not None and _hidden(render, parts, other) is None:
                return parts, other
        if refusal:
            raise UserError(
                f"{row.where}: the tokenizer's chat template refuses this conversation ({words_of(refusal)}); "
                "correct the row"
            ) from refusal
        if hidden is not None:
            raise UserError(
                f"{row.where}: message {hidden + 1}: the chat template does not print this content; write it as "
                "the template wants it, or into another message"
            )
        return messages, full

    def _in_its_form(self, row: RawRow, render: Render, template: str, messages: Messages) -> Messages:
        """`messages` with the roles, names and forms that the template reads. Errors: UserError."""

        def shown(some: Messages) -> str | None:
            return attempt(render, some, False)

        messages = settled_roles(shown, messages, row.where)
        messages = in_printed_form(shown, messages, row.where)
        messages, unseen = printed_thoughts(shown, messages, row.where)
        self.remarks.thoughts_unseen += unseen
        if template:
            keys = (key for message in messages for key in message if key not in READ_KEYS)
            self.remarks.unread.update(key for key in keys if key not in template)
        results = any(message["role"] == "tool" for message in messages)
        if results and "tool_responses" in template and not knows_role(shown, messages, "tool"):
            raise UserError(
                f"{row.where}: the chat template knows results of tools only inside the assistant's message "
                "(tool_responses), where they would be learnt; take this model's newer template, which knows role tool"
            )
        return messages

    def _next_opening(self, render: Render, messages: Messages) -> str:
        """The end-of-sequence token that the next turn's rendering puts after the last one, or ""."""
        last = probed(messages[-1])
        alone = attempt(render, [*messages[:-1], last], False)
        for message in _next_messages(messages[-1]):
            longer = attempt(render, [*messages[:-1], last, message], False)
            if alone is not None and longer is not None and PROBE in alone and NEXT in longer:
                closing = alone.rpartition(PROBE)[2]
                following = longer.partition(NEXT)[0].rpartition(PROBE)[2]
                end = self._stops.whole(following, shared_prefix(closing, following))
                opening = self._stops.opening(following[end:])
                if opening:
                    return opening
        return ""


def _said(content: Any) -> str:
    """All that a content says, in its parts if it has them."""
    if not isinstance(content, list):
        return content or ""
    return "".join(_said(p["text"] if p.get("text") is not None else p.get("thinking")) for p in content)


def _next_messages(last: dict[str, Any]) -> Messages:
    """What may follow: the result of a call, or the user."""
    user = {"role": "user", "content": NEXT}
    if not last.get("tool_calls"):
        return [user]
    call = last["tool_calls"][0]
    name = (call.get("function") or call)["name"]
    return [{"role": "tool", "content": NEXT, "name": name, "tool_call_id": call.get("id")}, user]


def _template(tokenizer: Any, row: RawRow, tools: list[dict[str, Any]] | None) -> str:
    """The source of the template for `row`, or "" where mlx-lm brings one in Python. Errors: UserError for several
    named ones and none for this row."""
    if tokenizer.chat_template is None:
        return ""
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise UserError(
            f"{row.where}: none of the tokenizer's chat templates ({names}) is named default; "
            "name one so in tokenizer_config.json, or write it into chat_template.jinja"
        ) from error


def _renderer(tokenizer: Any, template: str, tools: list[dict[str, Any]] | None) -> Render:
    options: dict[str, Any] = {"tools": tools, "tokenize": False}
    if "strftime_now" in template:
        options["chat_template"] = FIXED_CLOCK + template
    elif isinstance(tokenizer.chat_template, dict):
        options["chat_template"] = template

    def render(messages: Messages, generation_prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt, **options)
        )

    return render


def _hidden(render: Render, messages: Messages, full: str) -> int | None:
    """The first message of which `full`, the rendering, shows nothing, or None.

    Templates that want a list of parts print nothing of a string, and some have no place for a system message: the
    answers would be learnt as empty ones, or without what they follow from.
    """
    for turn, message in enumerate(messages):
        content = message.get("content")
        if message["role"] not in ("system", "user", "assistant") or not content:
            continue
        if isinstance(content, str) and content.strip() in full:
            continue
        changed = {**message, "content": rewritten(content, lambda: PROBE)}
        other = attempt(render, [*messages[:turn], changed, *messages[turn + 1 :]], False)
        if other is not None and PROBE not in other:
            return turn
    return None
