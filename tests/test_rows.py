"""From records to rows of tokens: ends, truncation, and what is counted and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from parablock import builtin
from parablock.sections import Data
from workers.rows import DataError, Rows, load_rows

TOKENIZER = builtin.tokenizer()
EOS, BOS = 258, 257
DATA = Path("/work/shared/data")


def load(records: list[Any], folder: Path, tokenizer: Any = TOKENIZER, **settings: Any) -> Rows:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_rows(str(path), Data(**settings), tokenizer=tokenizer, seed=0, held_out=False)


def pair(prompt: str, completion: str | None) -> dict[str, str | None]:
    return {"prompt": prompt, "completion": completion}


def test_a_row_is_prompt_answer_and_end_token(tmp_path: Path) -> None:
    (row,) = load([pair("2+2?", "4!")], tmp_path)
    assert row.tokens.tolist() == [*b"2+2?4!", EOS]
    assert row.counted.tolist() == [False] * 4 + [True] * 3
    assert (row.place, row.prompt, row.answer) == (0, 4, "4!")


def test_a_row_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    tokenizer = builtin.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{builtin.BOS} $A", special_tokens=[(builtin.BOS, BOS)]
    )
    (row,) = load([pair("a", "b")], tmp_path, tokenizer)
    assert row.tokens.tolist() == [BOS, *b"ab", EOS]
    assert row.counted.tolist() == [False, False, True, True]
    assert row.prompt == 2


def test_plain_text_counts_from_its_first_token_to_its_end(tmp_path: Path) -> None:
    (row,) = load([{"text": "abc"}], tmp_path, format="text")
    assert row.tokens.tolist() == [*b"abc", EOS]
    assert row.counted.all()
    assert (row.prompt, row.answer) == (0, "")


def test_a_conversation_that_is_cut_before_its_last_question_asks_nothing(tmp_path: Path) -> None:
    tokenizer = builtin.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    turns = [("user", "aa"), ("assistant", "bb"), ("user", "cc"), ("assistant", "dd")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (whole,) = load([record], tmp_path, tokenizer, format="chat")
    assert (whole.tokens.tolist(), whole.prompt, whole.answer) == ([*b"aabbccdd", EOS], 6, "dd")
    assert whole.counted.tolist() == [False, False, True, True, False, False, True, True, True]
    (cut,) = load([record], tmp_path, tokenizer, format="chat", max_tokens=5)
    assert (cut.tokens.tolist(), cut.prompt, cut.answer) == ([*b"aabbc"], 0, "")


def test_truncated_and_dropped_rows_are_counted_and_told(tmp_path: Path) -> None:
    records = [
        pair("p", "short"),
        pair("p", "a long answer"),
        pair("a long prompt", "x"),
        pair("p", None),
        pair("q", None),
        pair("p", " "),
    ]
    rows = load(records, tmp_path, max_tokens=10)
    assert [row.tokens.tolist() for row in rows] == [[*b"pshort", EOS], [*b"pa long an"]]
    assert [row.place for row in rows] == [0, 1]
    assert (rows.read, rows.truncated) == (6, 1)
    assert rows.dropped == {
        "no value in the field 'completion'": 2,
        "nothing in the field 'completion'": 1,
        "nothing left of the answer within data.max_tokens": 1,
    }
    assert rows.summary() == (
        "2 of 6 rows used; 1 truncated to data.max_tokens; 2 dropped: no value in the field 'completion'; "
        "1 dropped: nothing in the field 'completion'; 1 dropped: nothing left of the answer within data.max_tokens"
    )


def test_no_usable_rows_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable rows in shard 0/1 \(2 read; 2 dropped: no value in the field"):
        load([pair("p", None), pair("q", None)], tmp_path)
    with pytest.raises(DataError, match=r"no usable rows in shard 0/1 \(0 read\)"):
        load([], tmp_path)
    with pytest.raises(DataError, match="has no field 'prompt'"):
        load([{"question": "x", "answer": "y"}], tmp_path)


def test_held_out_rows_need_not_be_enough_for_every_worker() -> None:
    arguments: dict[str, Any] = {"tokenizer": TOKENIZER, "seed": 0, "shard": (3, 4), "limit": 2}
    assert len(load_rows("builtin", Data(), held_out=True, **arguments)) == 0
    assert len(load_rows("builtin", Data(), held_out=True, **arguments | {"shard": (1, 4)})) == 1
    with pytest.raises(
        DataError,
        match="no row for shard 3/4: rows are dealt out in turn, so 4 clients need at least 4 of them, "
        "and it has 3 at most; take fewer clients",
    ):
        load_rows("builtin", Data(), held_out=False, **arguments)


def test_a_file_without_rows_is_refused_also_as_held_out_ones(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"empty\.jsonl has no usable rows in shard 0/2 \(0 read\)"):
        load_rows(str(path), Data(), tokenizer=TOKENIZER, seed=0, held_out=True, shard=(0, 2))


def test_places_are_those_of_the_whole_source() -> None:
    rows = load_rows("builtin", Data(), tokenizer=TOKENIZER, seed=0, held_out=True, shard=(1, 3), limit=8)
    assert [row.place for row in rows] == [1, 4, 7]


def test_more_rows_than_are_tokenized_at_once_stay_in_order(tmp_path: Path) -> None:
    rows = load([pair(f"{n}", f"={n}") for n in range(1500)], tmp_path)
    assert [row.answer for row in rows] == [f"={n}" for n in range(1500)]
    assert rows[1499].tokens.tolist() == [*b"1499=1499", EOS]


def test_nothing_that_is_printed_holds_text_or_tokens(tmp_path: Path) -> None:
    rows = load([pair("secret", "secret")], tmp_path)
    for shown in (repr(rows), repr(rows[0]), rows.summary()):
        assert "secret" not in shown
        assert "115" not in shown


def tasks(folder: Path, *values: object, field: str = "task") -> list[str]:
    records = [{**pair("secret", "secret"), "kind": "secret", "task": value} for value in values]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = load_rows(str(path), Data(), tokenizer=TOKENIZER, seed=0, held_out=True, task=field)
    return [row.task for row in rows]


def test_a_rows_task_is_what_its_field_says(tmp_path: Path) -> None:
    assert tasks(tmp_path, "qa", "long division", 7, True, "\ud800") == ["qa", "long division", "7", "True", "\\ud800"]
    assert tasks(tmp_path, "qa", field="") == [""]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "has nothing in the field 'task'"),
        (" ", "has nothing in the field 'task'"),
        (["secret"], "has a list in the field 'task'"),
    ],
)
def test_a_row_without_its_task_is_named_and_nothing_of_it_is_shown(
    tmp_path: Path, value: object, expected: str
) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl, row 2 {expected}, which eval.task names") as caught:
        tasks(tmp_path, "qa", value)
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match=r"row 1 has no field 'topic', which eval.task names; it has completion, kind"):
        tasks(tmp_path, "qa", field="topic")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not on this machine")
def test_gsm8k_loads_whole() -> None:
    settings = Data(prompt="question", completion="answer", template="{prompt}\n", max_tokens=1500)
    rows = load_rows(str(DATA / "gsm8k_test.jsonl"), settings, tokenizer=TOKENIZER, seed=0, held_out=True, shard=(1, 2))
    assert len(rows) == rows.read == 659
    assert "####" in rows[0].answer
