"""What of a record carries loss, after format, template and chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from parablock import builtin
from parablock.sections import Data
from workers.segments import Segmenter, Unusable
from workers.sources import DataError, read

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = builtin.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def segments(record: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any) -> Any:
    return Segmenter("rows.jsonl", Data(**settings), tokenizer or builtin.tokenizer())(record)


def test_loss_is_on_the_completion_only() -> None:
    made = segments({"prompt": "2+2?", "completion": "4"})
    assert made.parts == [("2+2?", False), ("4", True)]
    assert made.answer == "4"


def test_a_template_takes_any_field_and_literal_braces() -> None:
    made = segments(
        {"q": "Why {x}?", "extra field": 7, "a": "So."},
        prompt="q", completion="a", template="{{{extra field}}} {prompt}\n",
    )  # fmt: skip
    assert made.parts == [("{7} Why {x}?\n", False), ("So.", True)]


@pytest.mark.parametrize("template", ["{}", "{prompt!r}", "{prompt:>8}", "{prompt"])
def test_a_template_that_is_wrong(template: str) -> None:
    with pytest.raises(DataError, match=r"data\.template"):
        segments({"prompt": "x", "completion": "y"}, template=template)


def test_a_template_looks_names_up_and_never_into_them() -> None:
    segmenter = Segmenter("rows.jsonl", Data(template="{prompt.__class__}"), builtin.tokenizer())
    with pytest.raises(DataError, match=r"no field 'prompt.__class__'"):
        segmenter.check_fields([{"prompt": "x", "completion": "y"}])


def test_plain_text_counts_all_of_it() -> None:
    made = segments({"body": "once upon a time"}, format="text", text="body")
    assert made.parts == [("once upon a time", True)]
    assert made.answer == ""


def test_of_a_chat_only_the_turns_of_the_assistant_count() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
    made = segments({"messages": messages}, chat_tokenizer(), format="chat")
    assert made.parts == [
        ("<|im_start|>system\nBe brief.<|eos|>\n<|im_start|>user\nHi<|eos|>\n<|im_start|>assistant\n", False),
        ("Hello<|eos|>\n", True),
        ("<|im_start|>user\n2+2?<|eos|>\n<|im_start|>assistant\n", False),
        ("4", True),
    ]
    assert made.answer == "4"
    assert made.written_out


def test_what_follows_the_last_answer_is_left_out() -> None:
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    messages = [{"role": role, "content": content} for role, content in turns]
    made = segments({"messages": messages}, chat_tokenizer(), format="chat")
    assert made.parts == [("<|im_start|>user\nHi<|eos|>\n<|im_start|>assistant\n", False), ("Hello", True)]


def test_the_chat_template_around_prompt_and_completion() -> None:
    made = segments(
        {"prompt": "2+2?", "completion": "4"}, chat_tokenizer(), template="Q: {prompt}", use_chat_template=True
    )
    assert made.parts == [("<|im_start|>user\nQ: 2+2?<|eos|>\n<|im_start|>assistant\n", False), ("4", True)]
    assert made.answer == "4"


@pytest.mark.parametrize(
    ("record", "settings", "reason"),
    [
        ({"prompt": "x", "completion": None}, {}, "no value in the field 'completion'"),
        ({"completion": "y"}, {}, "no value in the field 'prompt'"),
        ({"prompt": "x", "completion": " \n"}, {}, "nothing in the field 'completion'"),
        ({"prompt": "x", "completion": "\ud800"}, {}, "text that is not valid Unicode"),
        ({"text": ""}, {"format": "text"}, "nothing in the field 'text'"),
        ({"messages": None}, {"format": "chat"}, "no value in the field 'messages'"),
        ({"messages": []}, {"format": "chat"}, "no turn of the assistant"),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}]},
            {"format": "chat"},
            "an empty answer",
        ),
        (
            {"messages": [{"role": "assistant", "content": "Hi"}]},
            {"format": "chat"},
            "the assistant has the first turn",
        ),
        ({"messages": [{"role": "assistant", "content": ["x"]}]}, {"format": "chat"}, "a message without text"),
    ],
)
def test_a_record_that_is_of_no_use_says_why(record: dict[str, Any], settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=f"^{reason}$"):
        segments(record, chat_tokenizer(), **settings)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "rewrites earlier turns"),
        ("{{ raise_exception('no system') }}", "refuses the order of turns"),
    ],
)
def test_a_chat_template_that_does_not_fit(template: str, reason: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(Unusable, match=reason):
        segments({"messages": messages}, chat_tokenizer(template), format="chat")


def test_a_chat_needs_a_template_and_every_row_an_end() -> None:
    with pytest.raises(DataError, match="no chat template"):
        segments({}, format="chat")
    tokenizer = builtin.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        segments({}, tokenizer)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "rows.jsonl has no field 'prompt'; it has answer, id, question; .* --set data.prompt=question"),
        ({"prompt": "question"}, "has no field 'completion'; .* --set data.completion=answer"),
        ({"template": "{topic}"}, "has no field 'topic'; .* write data.template with these"),
        ({"format": "text"}, "has no field 'text'; .* --set data.text=NAME"),
    ],
)
def test_a_missing_field_is_told_with_those_that_there_are(settings: dict[str, Any], expected: str) -> None:
    segmenter = Segmenter("rows.jsonl", Data(**settings), builtin.tokenizer())
    with pytest.raises(DataError, match=expected):
        segmenter.check_fields([{"question": "x", "answer": "y"}, {"id": 1}])


def test_what_stands_where_a_header_should_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('"the patient is called Ann","she is ill"\n"Bob is called next","he is well"\n')
    rows = [record for _, record in read(str(path), split="", seed=0, held_out=False, shard=(0, 1), limit=0)]
    with pytest.raises(DataError) as caught:
        Segmenter("rows.csv", Data(), builtin.tokenizer()).check_fields(rows)
    assert "it has 2 that are no plain names (has the file a header line?); name the right one" in str(caught.value)
    assert "called" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "settings", "expected"),
    [
        ({"prompt": ["secret"], "completion": "y"}, {}, "'prompt' of rows.jsonl holds a list; expected text"),
        ({"messages": "secret"}, {"format": "chat"}, "must hold a list of messages with role and content"),
        ({"messages": [{"from": "secret"}]}, {"format": "chat"}, "must hold a list of messages with role and content"),
    ],
)
def test_a_field_of_another_kind(record: dict[str, Any], settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        segments(record, chat_tokenizer(), **settings)
    assert "secret" not in str(caught.value)
