"""The text of a record that counts and the text that does not, after the settings: fields, templates, chat turns.

A record becomes segments, each with or without loss; every segment is tokenized by itself, as generation later meets
it. Tokens, truncation and the counting of what is dropped are `workers.rows`' business. No message holds text from a
record.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import TemplateError

from workers.sources import DataError, Record, named_fields

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from parablock import sections


_USUAL = {
    "data.prompt": ("question", "instruction", "prompt", "input", "problem", "query"),
    "data.completion": ("answer", "response", "completion", "output", "solution", "target"),
    "data.messages": ("messages", "conversation", "conversations", "chat"),
    "data.text": ("text", "content", "document"),
}
"""What data sets call the fields, to guess the right one for whoever named a wrong one."""


class Unusable(Exception):
    """A record that cannot become a row; the message is the reason that is counted."""


@dataclass(frozen=True)
class Segments:
    """A record as segments of text, each with whether it counts for the loss.

    written_out: whether the text has the begin token in it already, as a chat template writes it. answer: what the
    last segment says, "" where nothing was asked.
    """

    parts: list[tuple[str, bool]] = field(repr=False)
    answer: str = field(repr=False)
    written_out: bool = False


class Segmenter:
    """From a record to segments of text, after the settings and for the tokenizer."""

    def __init__(self, source: str, settings: sections.Data, tokenizer: PreTrainedTokenizerBase) -> None:
        self._source = source
        self._settings = settings
        self._tokenizer = tokenizer
        self._chat = settings.format == "chat" or (settings.format == "prompt" and settings.use_chat_template)
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end token, so no answer could ever end; set eos_token in the model's "
                "tokenizer_config.json"
            )
        if self._chat and not tokenizer.chat_template:
            raise DataError(
                'the tokenizer has no chat template; use data.format = "prompt" with data.use_chat_template = false '
                "and say in data.template how a prompt is written"
            )
        # The model's own tokenizer says whether a text starts with the begin token.
        starts = tokenizer("")["input_ids"][:1]
        self._bos: list[int] = starts if starts == [tokenizer.bos_token_id] else []
        self._template = _parse_template(settings.template)

    def check_fields(self, records: Sequence[Record]) -> None:
        """Raise DataError for a field that none of the records has, naming those that there are."""
        for wanted, key in self._fields().items():
            if records and not any(wanted in record for record in records):
                there = {name for record in records[:100] for name in record}
                likely = next((name for name in _USUAL.get(key, ()) if name in there), "NAME")
                advice = (
                    "write data.template with these"
                    if key == "data.template"
                    else f"name the right one in the run's config, as in --set {key}={likely}"
                )
                raise DataError(
                    f"{self._source} has no field {wanted!r}; it has {named_fields(records[:100])}; {advice}"
                )

    def __call__(self, record: Record) -> Segments:
        """Raises Unusable with the reason."""
        made = self._segments(record)
        try:
            "".join(text for text, _ in made.parts).encode()
        except UnicodeEncodeError:  # half a surrogate pair, as JSON can hold
            raise Unusable("text that is not valid Unicode") from None
        return made

    def _segments(self, record: Record) -> Segments:
        settings = self._settings
        if settings.format == "text":
            return Segments([(self._value(record, settings.text, filled=True), True)], answer="")
        if settings.format == "chat":
            return self._conversation(self._messages(record))
        values = {name: self._value(record, name) for name in self._fields()}
        answer = self._value(record, settings.completion, filled=True)
        prompt = "".join(
            literal + ("" if name is None else values[settings.prompt if name == "prompt" else name])
            for literal, name in self._template
        )
        if self._chat:
            return self._conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
        return Segments([(prompt, False), (answer, True)], answer)

    def joined(self, text: Segments, ids: list[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.bool_], int]:
        """Tokens and whether each counts, from begin to end token, and how many stand before the answer.

        ids: the tokens of each of the text's segments.
        """
        begin = [] if text.written_out else self._bos
        parts = [(begin, False), *((part, flag) for part, (_, flag) in zip(ids, text.parts, strict=True))]
        prompt = sum(len(part) for part, _ in parts[:-1]) if text.answer else 0
        parts.append(([self._tokenizer.eos_token_id], True))
        tokens = np.array([token for part, _ in parts for token in part], dtype=np.int32)
        counted = np.array([flag for part, flag in parts for _ in part], dtype=np.bool_)
        return tokens, counted, prompt

    def _fields(self) -> dict[str, str]:
        """The fields that a record needs, each with the setting that names it."""
        settings = self._settings
        if settings.format == "text":
            return {settings.text: "data.text"}
        if settings.format == "chat":
            return {settings.messages: "data.messages"}
        named = {name for _, name in self._template if name is not None}
        fields = {name: "data.template" for name in sorted(named - {"prompt"})}
        if "prompt" in named:
            fields[settings.prompt] = "data.prompt"
        return fields | {settings.completion: "data.completion"}

    def _value(self, record: Record, name: str, *, filled: bool = False) -> str:
        """The field as text; where it has to be `filled`, more than white space."""
        value = record.get(name)
        if value is None:
            raise Unusable(f"no value in the field {name!r}")
        if not isinstance(value, str | int | float):
            raise DataError(
                f"the field {name!r} of {self._source} holds a {type(value).__name__}; expected text. "
                'Name another field, or use data.format = "chat" for messages'
            )
        if filled and not str(value).strip():
            raise Unusable(f"nothing in the field {name!r}")
        return str(value)

    def _messages(self, record: Record) -> list[dict[str, str]]:
        name = self._settings.messages
        messages = record.get(name)
        if messages is None:
            raise Unusable(f"no value in the field {name!r}")
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
        ):
            raise DataError(
                f"the field {name!r} of {self._source} must hold a list of messages with role and content; "
                "name another field (--set data.messages=NAME), or convert the file"
            )
        if not all(isinstance(message.get("content"), str) for message in messages):
            raise Unusable("a message without text")
        return messages

    def _conversation(self, messages: list[dict[str, str]]) -> Segments:
        """The chat template's text, cut where an assistant's turn begins and ends."""
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise Unusable("no turn of the assistant")
        if turns[0] == 0:
            raise Unusable("the assistant has the first turn")
        if not messages[turns[-1]]["content"].strip():
            raise Unusable("an empty answer")
        segments: list[tuple[str, bool]] = []
        done = ""
        for place in turns:
            for text, counted in (
                (self._render(messages[:place], ask=True), False),
                (self._render(messages[: place + 1], ask=False), True),
            ):
                if not text.startswith(done):
                    raise Unusable("the chat template rewrites earlier turns")
                segments.append((text[len(done) :], counted))
                done = text
        last, _ = segments[-1]
        # The row ends with the end token; what a template writes after it would never be generated.
        eos = self._tokenizer.eos_token
        last = last[: last.rindex(eos)] if eos in last else last
        return Segments([*segments[:-1], (last, True)], messages[turns[-1]]["content"], written_out=True)

    def _render(self, messages: list[dict[str, str]], *, ask: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        except (TemplateError, ValueError) as error:
            raise Unusable("the chat template refuses the order of turns") from error
        return text


def _parse_template(template: str) -> list[tuple[str, str | None]]:
    """Literal text and the field after it (None after the last). A name is only ever looked up, never evaluated."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"data.template is wrong ({error}); write {{{{ and }}}} for braces that are text") from error
    if any(name == "" or specification or conversion for _, name, specification, conversion in parsed):
        raise DataError("data.template may only hold {NAME} for fields; write {{ and }} for braces that are text")
    return [(literal, name) for literal, name, _, _ in parsed]
