"""`parablock evaluate --lm-eval`: what task files may bring, what their numbers look like, and, where lm_eval is
installed, that they are those of a plain sum over rows."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional

from parablock import builtin
from tests.shown import shown
from tests.test_evaluate_command import forget_head, refusal, scores, stored_run
from workers import task_files
from workers.evaluate_command import main
from workers.harness_scorecard import HarnessScorecard

if TYPE_CHECKING:
    from pathlib import Path

METRICS = {"acc", "perplexity", "exact_match"}
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install -e '.[lm-eval]'"
)
# Others' code warns of much, as of what a later Python will do otherwise.
quiet = pytest.mark.filterwarnings("default")

TEXTS = [("one", " two"), ("red", " green"), ("up", " and down"), ("a", "b")]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
"""
LIKELY = f"""
task: likely
tag: ours
{COMMON}
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""
CHOICE = f"""
task: choice
tag: ours
{COMMON}
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks over one file of rows."""
    rows = [
        {"prompt": prompt, "answer": answer, "options": [answer, "no"], "right": place % 2}
        for place, (prompt, answer) in enumerate(TEXTS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    for name, text in (("likely", LIKELY), ("choice", CHOICE)):
        write(tmp_path / "tasks" / f"{name}.yaml", text.replace("DATA", str(tmp_path / "rows.jsonl")))
    return tmp_path / "tasks"


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def test_files_of_data_alone_may_be_used(folder: Path) -> None:
    task_files.check(folder, METRICS, trusted=False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("process_results: !function utils.score", "names code by !function"),
        ("class: !function task.Task", "names code by !function"),
        ("process_docs: !<!function> utils.docs", "names code by !function"),
        ("group: g\ntask: [{task: t, fewshot_config: {samples: !function u.s}}]", "names code by !function"),
        ("unsafe_code: true", "lets answers be run as code (unsafe_code)"),
        ("a: &a [*a, *a]\nb: [*a, {process_docs: !function u.docs}]", "names code by !function"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "takes a metric from the hub, which is code (hf_evaluate)"),
        ("metric_list: [{metric: hub/score}]", "has the metric 'hub/score', which is not the harness's own"),
        ("use_prompt: promptsource:a", "takes its prompt from another library or file (use_prompt)"),
    ],
)
def test_code_in_a_task_file_is_refused_unless_it_is_trusted(folder: Path, text: str, told: str) -> None:
    write(folder / "other.yaml", f"task: other\n{text}\n" if "task:" not in text else text)
    with pytest.raises(task_files.TaskFileError) as caught:
        task_files.check(folder, METRICS, trusted=False)
    assert f"other.yaml {told}" in str(caught.value)
    assert "--set trust_remote_code=true" in str(caught.value)
    task_files.check(folder, METRICS, trusted=True)


def test_an_included_file_is_looked_through_wherever_it_is(folder: Path) -> None:
    write(folder / "other.yaml", "include: ../base\ntask: other\n")
    write(folder.parent / "base", "include: [more]\nnum_fewshot: 0\n")
    write(folder.parent / "more", "include: base\ndoc_to_text: !function utils.text\n")  # and back: no end of it
    with pytest.raises(task_files.TaskFileError, match=r"/more names code by !function"):
        task_files.check(folder, METRICS, trusted=False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task: [", r"bad\.yaml is no YAML that a task file may hold"),
        ("a: !!python/object/apply:os.system ['true']", r"bad\.yaml is no YAML that a task file may hold"),
        ("- a", r"bad\.yaml is no task file: it holds no settings"),
        ("task: t\ninclude: nowhere", r"cannot read the task file .*/nowhere: No such file"),
    ],
)
def test_what_is_no_task_file_is_refused_also_where_it_is_trusted(folder: Path, text: str, told: str) -> None:
    write(folder / "bad.yaml", text)
    with pytest.raises(task_files.TaskFileError, match=told):
        task_files.check(folder, METRICS, trusted=True)


def test_a_folder_without_task_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(task_files.TaskFileError, match=r"holds no task file: none ends in \.yaml"):
        task_files.check(tmp_path, METRICS, trusted=True)
    with pytest.raises(task_files.TaskFileError, match="there is no folder"):
        task_files.check(tmp_path / "nowhere", METRICS, trusted=True)


RESULTS: dict[str, Any] = {
    "results": {
        "choice": {"alias": "choice", "sample_len": 4, "acc,none": 0.5, "acc_stderr,none": 0.25, "name": "choice"},
        "sums": {"alias": "sums", "exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A"}
        | {"x,none": math.inf, "y,none": 1.25e9},
    },
    "groups": {"g": {"alias": "g", "acc,none": 0.5, "acc_stderr,none": 0.125}},
    "versions": {"choice": 1.0, "sums": "Yaml"},
    "n-shot": {"choice": 2, "sums": 0},
    "higher_is_better": {"choice": {"acc": True}, "sums": {"exact_match": True}},
    "n-samples": {"choice": {"original": 10, "effective": 4}, "sums": {"original": 4, "effective": 4}},
}


def test_numbers_are_told_by_task_and_metric() -> None:
    tree = HarnessScorecard(RESULTS).tree()
    assert tree["tasks"]["choice"] == {
        "version": 1.0,
        "rows": 4,
        "shots": 2,
        "metrics": [{"metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.25, "higher_is_better": True}],
    }
    strict, infinite, _ = tree["tasks"]["sums"]["metrics"]
    assert (strict["filter"], strict["value"], strict["stderr"]) == ("strict", 0.25, None)
    assert (infinite["value"], infinite["higher_is_better"]) == (None, None)
    assert (tree["groups"]["g"]["rows"], tree["groups"]["g"]["metrics"][0]["stderr"]) == (None, 0.125)
    json.dumps(tree, allow_nan=False)


def test_the_table_has_a_line_for_each_metric() -> None:
    lines = [line.split() for line in shown(HarnessScorecard(RESULTS).table("scores")).splitlines()]
    assert ["g", "–", "–", "acc", "none", "0.5000", "0.1250"] in lines
    assert ["choice", "4", "2", "acc", "none", "0.5000", "0.2500"] in lines
    assert ["sums", "4", "0", "exact_match", "strict", "0.2500", "–"] in lines
    assert ["x", "none", "–", "–"] in lines
    assert ["y", "none", "1.25e+09", "–"] in lines


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tasks-dir", "."], "--tasks-dir and --limit belong to --lm-eval"),
        (["--limit", "3"], "--tasks-dir and --limit belong to --lm-eval"),
        (["--lm-eval", "a"], "--lm-eval wants --tasks-dir DIR"),
        (["--lm-eval", "a", "--tasks-dir", ".", "--data", "builtin"], "leave --data and --answers out"),
        (["--lm-eval", "a", "--tasks-dir", ".", "--answers", "a.jsonl"], "leave --data and --answers out"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in refusal(capsys, "builtin", *arguments)


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1.5"])
def test_a_limit_is_a_number_of_rows(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["builtin", "--lm-eval", "a", "--tasks-dir", ".", "--limit", limit])
    assert "a whole number of rows from 1" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed here")
def test_without_the_extra_it_is_said_how_to_get_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, "builtin", "--lm-eval", "likely", "--tasks-dir", str(folder))
    assert "needs lm_eval, which is not installed here: pip install -c constraints.txt -e '.[lm-eval]'" in told


# With the harness


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing can be fetched, and what is cached would be seen in the folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def log_likelihood(prompt: str, answer: str) -> float:
    """Of the answer's bytes after the prompt's, by the built-in model of seed 0."""
    text = list((prompt + answer).encode())
    with torch.no_grad():
        logits = builtin.model(0)(torch.tensor([text])).logits[0, :-1].float()
    losses = functional.cross_entropy(logits, torch.tensor(text[1:]), reduction="none")
    return -float(losses[len(prompt.encode()) - 1 :].sum())


@needs_lm_eval
@quiet
def test_the_numbers_are_those_of_a_plain_sum(folder: Path, offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = scores(capsys, "builtin", "--lm-eval", "ours", "--tasks-dir", str(folder))
    likely, choice = tree["tasks"]["likely"], tree["tasks"]["choice"]
    sums = [log_likelihood(prompt, answer) for prompt, answer in TEXTS]
    assert likely["metrics"][0]["value"] == pytest.approx(math.exp(-sum(sums) / 4), rel=1e-4)
    right = [
        (0 if own >= log_likelihood(prompt, "no") else 1) == place % 2
        for place, ((prompt, _), own) in enumerate(zip(TEXTS, sums, strict=True))
    ]
    assert [metric["metric"] for metric in choice["metrics"]] == ["acc"]
    assert choice["metrics"][0]["value"] == sum(right) / 4
    assert (likely["rows"], likely["shots"], choice["rows"]) == (4, 0, 4)
    assert not offline.exists(), "no copy of the rows stays in a cache"


@needs_lm_eval
@quiet
def test_rows_can_be_limited_and_tasks_named_by_a_pattern(
    folder: Path, offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del offline
    tree = scores(capsys, "builtin", "--lm-eval", "lik*,likely", "--tasks-dir", str(folder), "--limit", "2")
    assert {name: task["rows"] for name, task in tree["tasks"].items()} == {"likely": 2}
    assert main(["builtin", "--lm-eval", "likely", "--tasks-dir", str(folder), "--limit", "2"]) == 0
    assert "perplexity" in capsys.readouterr().out


@needs_lm_eval
@quiet
@pytest.mark.parametrize(
    ("task", "change", "told"),
    [
        ("nothing", ("", ""), "there is no task 'nothing' in "),
        ("likely", ("rows.jsonl", "gone.jsonl"), "lm_eval cannot load likely (FileNotFoundError"),
        ("likely", ("{{prompt}}", "{{question}}"), "lm_eval cannot load likely (UndefinedError"),
        ("likely", ("{{prompt}}", "{{prompt.__class__.__mro__}}"), "lm_eval cannot load likely (SecurityError"),
    ],
)
def test_what_a_task_file_gets_wrong_is_told(
    task: str, change: tuple[str, str], told: str, folder: Path, offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del offline
    path = folder / "likely.yaml"
    write(path, path.read_text(encoding="utf-8").replace(*change))
    assert told in refusal(capsys, "builtin", "--lm-eval", task, "--tasks-dir", str(folder))


@needs_lm_eval
@quiet
@pytest.mark.parametrize(
    ("longer", "told"),
    [
        (50, "lm_eval cannot work out a metric of likely (OverflowError: math range error)"),
        (100, "lm_eval gives up on a row of likely (assert len(continuation_enc) <= self.max_length); the model's"),
    ],
)
def test_what_the_harness_cannot_do_with_a_row_is_told(
    longer: int, told: str, folder: Path, offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del offline
    path = folder / "likely.yaml"
    write(path, path.read_text(encoding="utf-8").replace("{{answer}}", f"{{{{answer * {longer}}}}}"))
    assert told in refusal(capsys, "builtin", "--lm-eval", "likely", "--tasks-dir", str(folder))


@needs_lm_eval
@quiet
def test_code_beside_a_task_file_runs_only_where_it_is_trusted(
    folder: Path, offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del offline
    path = folder / "likely.yaml"
    write(path, path.read_text(encoding="utf-8").replace('"{{prompt}}"', "!function beside.text"))
    write(folder / "beside.py", "def text(doc):\n    return doc['prompt'] + 'x'\n")
    arguments = ("builtin", "--lm-eval", "likely", "--tasks-dir", str(folder))
    assert "likely.yaml names code by !function" in refusal(capsys, *arguments)
    tree = scores(capsys, *arguments, "--set", "trust_remote_code=true")
    expected = math.exp(-sum(log_likelihood(prompt + "x", answer) for prompt, answer in TEXTS) / 4)
    assert tree["tasks"]["likely"]["metrics"][0]["value"] == pytest.approx(expected, rel=1e-4)


@needs_lm_eval
@quiet
def test_a_run_is_evaluated_with_its_blocks(
    folder: Path, offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del offline
    run = stored_run(tmp_path / "run")
    forget_head(run)
    tree = scores(capsys, str(run.path), "--lm-eval", "likely", "--tasks-dir", str(folder))
    tokens = sum(len(answer) for _, answer in TEXTS)
    assert tree["tasks"]["likely"]["metrics"][0]["value"] == pytest.approx(259 ** (tokens / 4), rel=1e-3)
