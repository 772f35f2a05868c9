"""Settings: an error tells the key, what was expected and what came; what is right survives a round trip."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import tomllib
import typing
from typing import TYPE_CHECKING, Any, Literal

import pytest
from hypothesis import given, reject
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rich.console import Console

from parablock import config as settings
from parablock import config_command
from parablock.config import (
    MAY_CHANGE,
    Config,
    ConfigError,
    check_resumed,
    from_dict,
    keys,
    load,
    to_dict,
    to_toml,
    toml_value,
)

if TYPE_CHECKING:
    from pathlib import Path


def refused(tree: Any, *facts: str) -> str:
    """The message of the ConfigError that `tree` gives, which must tell every one of `facts`."""
    with pytest.raises(ConfigError) as caught:
        from_dict(tree)
    for fact in facts:
        assert fact in str(caught.value)
    return str(caught.value)


def outcome(tree: Any) -> Config | str:
    """The config that `tree` gives, or the ConfigError's message."""
    try:
        return from_dict(tree)
    except ConfigError as error:
        return str(error)


def nested(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return typing.cast("dict[str, Any]", value)


def leaves(cls: type[Any] = Config, prefix: str = "") -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Path → (type, field) of every setting, found without `keys()`."""
    found: dict[str, tuple[Any, dataclasses.Field[Any]]] = {}
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            found |= leaves(hints[item.name], f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = (hints[item.name], item)
    return found


LEAVES = leaves()


def value_of(path: str) -> st.SearchStrategy[Any]:
    """Values that the setting allows, by its own bounds."""
    hint, item = LEAVES[path]
    low, high, above = (item.metadata[name] for name in ("low", "high", "above"))
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    if hint is bool:
        return st.booleans()
    if hint is str:
        return st.text(max_size=20)
    if hint is int:
        return st.integers(low, high)
    least = low if low is not None else above
    return st.floats(
        least, high, exclude_min=above is not None, allow_nan=False, allow_infinity=False, allow_subnormal=False
    )


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Valid configs in which any number of settings differ from their defaults."""
    tree: dict[str, Any] = {}
    for path in draw(st.lists(st.sampled_from(sorted(LEAVES)), unique=True, max_size=20)):
        *tables, name = path.split(".")
        node = tree
        for table in tables:
            node = node.setdefault(table, {})
        node[name] = draw(value_of(path))
    config = outcome(tree)
    if isinstance(config, str):
        # Each value is in its range, so that only the checks of several settings together may object.
        known = "robust|exclude|never be reached|must be below|at least twice|more than twice|multiple of 256|one chunk"
        known += "|secure.enabled|secure.threshold|privacy"
        known += "|adaptive|max_steps|sgd only|partition.field|draws for a round|with mode = (fedcybgd|lisa)"
        assert re.search(known, config)
        reject()
    return config


# What is right


def test_without_a_file_everything_has_its_default() -> None:
    config = load(None)
    assert config == Config() == from_dict({})
    assert (config.model, config.mode, config.solver.steps, config.pipeline.correction) == (
        "builtin",
        "parablock",
        8,
        "shrink",
    )


def test_a_file_is_read_and_overrides_win_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('rounds = 7\nseed = 3\n[solver]\nlr = 0.5\n[data]\ntrain = "häuser.jsonl"\n', encoding="utf-8")
    config = load(path, ["solver.steps=2", "seed=4", "seed=5"])
    assert (config.rounds, config.seed, config.solver.lr, config.solver.steps) == (7, 5, 0.5, 2)
    assert config.data.train == "häuser.jsonl"
    assert load(str(path)) == load(path)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(None).rounds = 1  # type: ignore[misc]


def test_the_synchronous_mode_has_nothing_in_flight() -> None:
    assert load(None, ["pipeline.max_in_flight=3"]).in_flight == 3
    assert load(None, ["pipeline.max_in_flight=3", "mode=fedbcd"]).in_flight == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [(["round.fraction=0.5"], 2), (["round.fraction=0.5", "round.clients=8"], 3), (["mode=fedcybgd"], 1)],
)
def test_the_quorum_is_a_majority_of_those_that_are_drawn(settings: list[str], expected: int) -> None:
    assert load(None, ["round.clients=4", *settings]).quorum == expected


@pytest.mark.parametrize(
    ("settings", "announced"),
    [([], False), (["schedule.order=random"], False), (["schedule.order=importance"], True), (["mode=fedcybgd"], True),
     (["round.fraction=0.9"], True), (["mode=fedbcd"], False), (["mode=lisa"], False)],
)  # fmt: skip
def test_rounds_are_announced_where_they_do_not_follow_from_the_settings(settings: list[str], announced: bool) -> None:
    assert load(None, settings).announced is announced


def test_two_rounds_of_lisa_exchange_what_was_trained_at_once() -> None:
    config = load(None, ["mode=lisa", "pipeline.max_in_flight=3"])
    assert (config.together, config.in_flight, config.delay) == (2, 1, 0)
    for mode, delay in (("parablock", 3), ("fedbcd", 0), ("fedcybgd", 0)):
        config = load(None, [f"mode={mode}", "pipeline.max_in_flight=3"])
        assert (config.together, config.delay) == (1, delay)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("rounds=41", "rounds = 41 must be even with mode = lisa"),
        ("eval.every=5", "eval.every = 5 must be even with mode = lisa"),
        ("round.fraction=0.5", "round.fraction = 0.5 does not go with mode = lisa"),
        ("schedule.order=importance", "schedule.order = importance does not go with mode = lisa"),
    ],
)
def test_what_lisa_has_no_meaning_for_is_refused(setting: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(None, ["mode=lisa", setting])


@pytest.mark.parametrize(("clients", "quorum", "expected"), [(1, 0, 1), (2, 0, 2), (3, 0, 2), (4, 0, 3), (4, 1, 1)])
def test_the_quorum_is_a_majority_unless_it_is_said(clients: int, quorum: int, expected: int) -> None:
    assert load(None, [f"round.clients={clients}", f"round.quorum={quorum}"]).quorum == expected


def test_whole_numbers_serve_as_floats_but_not_the_other_way_round() -> None:
    lr = from_dict({"solver": {"lr": 1}}).solver.lr
    assert (lr, type(lr)) == (1.0, float)
    refused({"rounds": 3.0}, "rounds must be a whole number", "got 3.0")


@pytest.mark.parametrize("path", [path for path, (hint, _) in LEAVES.items() if hint in (int, float)])
def test_bounds_are_part_of_the_range_unless_they_are_said_to_be_below_it(path: str) -> None:
    hint, item = LEAVES[path]
    for name, step in (("low", -1), ("high", 1)):
        bound = item.metadata[name]
        if bound is not None:
            settings._check(path, item, hint, hint(bound))
            beyond = hint(bound) + step if hint is int else math.nextafter(bound, bound + step)
            words = {"low": "at least", "high": "at most"}[name]
            refused(nested(path, beyond), f"{path} must be", f"{words} {bound:.10g}", f"got {beyond!r}")
    if item.metadata["above"] is not None:
        refused(nested(path, hint(item.metadata["above"])), f"{path} must be", f"above {item.metadata['above']:g}")


# Round trips


@given(configs())
def test_to_toml_is_read_back_to_an_equal_tree(config: Config) -> None:
    assert from_dict(tomllib.loads(to_toml(config))) == config
    assert from_dict(to_dict(config)) == config


def test_to_toml_is_read_back_from_a_file(tmp_path: Path) -> None:
    config = load(None, ['data.template="a\\n\\"{prompt}\\"\\t"', "model=C:\\models\\x", "solver.lr=1e-5"])
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert load(tmp_path / "config.toml") == config


@given(st.text())
def test_any_text_survives_quoting(text: str) -> None:
    assert tomllib.loads(f"value = {toml_value(text)}")["value"] == text


@given(configs())
def test_every_setting_can_be_set_on_the_command_line(config: Config) -> None:
    lines = []
    for path in LEAVES:
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name)
        lines.append(f"{path}={toml_value(value)}")
    assert load(None, lines) == config


# --set


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shard.jsonl", "shard.jsonl"),
        ("/data/a=b/c.jsonl", "/data/a=b/c.jsonl"),
        ("'/data/with space.jsonl'", "/data/with space.jsonl"),
        ('"/data/quoted.jsonl"', "/data/quoted.jsonl"),
        ("/data/with space's.jsonl", "/data/with space's.jsonl"),
        ('"unfinished', '"unfinished'),
        ('"a"\nb = 1', '"a"\nb = 1'),
        ("2024", "2024"),
        ("2024-01-31", "2024-01-31"),
        ("1#2", "1#2"),
        ("true", "true"),
        ("inf", "inf"),
        ("[a]", "[a]"),
        ("[1, 2]", "[1, 2]"),
        ("C:\\data\\new.jsonl", "C:\\data\\new.jsonl"),
        ("  padded  ", "padded"),
        ("", ""),
        ("1" * 4096, "1" * 4096),
        ("[" * 4096, "[" * 4096),
    ],
)
def test_text_needs_no_quotes_on_the_command_line(text: str, expected: str) -> None:
    assert load(None, [f"data.train={text}"]).data.train == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("solver.lr=1e-5", 1e-5),
        ("solver.lr = 3", 3.0),
        ("rounds=1_000", 1000),
        ("solver.gradient_checkpointing=true", True),
        ("mode=fedbcd", "fedbcd"),
        ('mode="fedbcd"', "fedbcd"),
    ],
)
def test_other_values_are_read_as_toml(override: str, expected: object) -> None:
    value: Any = load(None, [override])
    for name in override.partition("=")[0].strip().split("."):
        value = getattr(value, name)
    assert value == expected


@pytest.mark.parametrize("override", ["solver.lr", "", "=3", "  =3"])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--set expects KEY=VALUE, got .*; for example --set solver.lr=1e-4"
    ) as caught:
        load(None, [override])
    assert repr(override) in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rounds=3", "rounds.x=3"], "--set rounds.x=3: 'rounds' is a value, not a table"),
        (["rounds.x=3"], "rounds must be a whole number at least 1, at most 10000000; got {'x': 3}"),
        (["solver=3"], "solver is a table of settings, got 3"),
        (["solver..lr=3"], "there is no setting solver."),
        (["rounds=many"], "rounds must be a whole number at least 1, at most 10000000; got 'many'"),
        (["solver.gradient_checkpointing=yes"], "must be true or false; got 'yes'"),
        (["rounds=[1]"], "rounds must be a whole number at least 1, at most 10000000; got '[1]'"),
        (["solver.lr=nan"], "solver.lr must be a number above 0; got nan"),
    ],
)
def test_an_override_that_does_not_fit_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    assert message in str(caught.value)


# What is wrong


@pytest.mark.parametrize(
    ("path", "guess"),
    [
        ("lr", "solver.lr"),  # right name, no table
        ("solver.stepz", "solver.steps"),
        ("sover.gradient_checkpointing", "solver"),
        ("evaluation.batch_size", "eval"),
        ("network.clients", "round.clients"),  # right name, wrong table
        ("server.smoothing", "pipeline.smoothing"),
        ("pipeline.in_flight", "pipeline.max_in_flight"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(path: str, guess: str) -> None:
    refused(nested(path, 1), f"Did you mean {guess}?", "`parablock config --explain` lists them all")


def test_an_unknown_key_that_is_like_none_gets_no_guess() -> None:
    message = refused({"zzzzzz": 1}, "there is no setting zzzzzz.", "--explain")
    assert "Did you mean" not in message


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("rounds", True, "a whole number"),
        ("rounds", "7", "a whole number"),
        ("rounds", None, "a whole number"),
        ("solver.lr", True, "a number above 0"),
        ("solver.lr", "0.1", "a number above 0"),
        ("solver.lr", [0.1], "a number above 0"),
        ("solver.gradient_checkpointing", 1, "true or false"),
        ("model", 7, "text"),
        ("mode", "sync", "one of parablock, fedbcd"),
        ("mode", 1, "one of parablock, fedbcd"),
        ("mode", ["fedbcd"], "one of parablock, fedbcd"),
        ("dtype", "Float32", "one of auto, float32, bfloat16, float16"),
        ("solver.optimizer", "adam", "one of adamw, sgd, adafactor"),
        ("solver.state", True, "one of reset, keep"),
        ("round.late", "keep", "one of discard, fold"),
        ("round.quorum_lost", "close", "one of wait, fewer, stop"),
        ("round.grace", "yes", "true or false"),
        ("server.optimizer", "fedadam", "one of average, momentum, nesterov, adam, yogi"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(path: str, value: Any, expected: str) -> None:
    refused(nested(path, value), f"{path} must be {expected}", f"got {value!r}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -(10**400)])
@pytest.mark.parametrize("path", ["solver.weight_decay", "solver.lr", "server.momentum", "network.timeout_s"])
def test_numbers_that_are_not_finite_or_too_large_are_refused(path: str, value: float) -> None:
    refused(nested(path, value), f"{path} must be a number", "got ")


def test_text_that_is_not_unicode_is_refused() -> None:
    # As a file name that is not UTF-8 comes from the command line; no TOML file and no message could hold it.
    with pytest.raises(ConfigError, match=r"data\.train must be valid Unicode, got .*; rename the file or folder"):
        load(None, ["data.train=\udcff.jsonl"])


def test_a_long_value_is_not_repeated_whole() -> None:
    assert len(refused({"rounds": "x" * 100_000}, "rounds must be")) < 400


@pytest.mark.parametrize("tree", [[], 3, "text", None])
def test_a_config_is_a_table(tree: Any) -> None:
    refused(tree, "a config is a table of settings", f"got {tree!r}")
    refused({"solver": tree}, "solver is a table of settings", f"got {tree!r}")


@pytest.mark.parametrize(
    ("tree", "facts"),
    [
        (
            {"blocks": {"num_blocks": 2, "max_block_mb": 1.0}},
            ["blocks.num_blocks and blocks.max_block_mb exclude each other", "set one of them to 0"],
        ),
        (
            {"round": {"clients": 2, "quorum": 3}},
            ["round.quorum = 3", "round.clients = 2", "lower the quorum or expect more clients"],
        ),
        (
            {"round": {"clients": 4, "quorum": 3, "fraction": 0.5}},
            ["round.quorum = 3", "the 2 of round.clients = 4", "round.fraction = 0.5", "lower the quorum or raise the"],
        ),
        ({"round": {"fraction": 0.0}}, ["round.fraction must be a number above 0, at most 1", "got 0.0"]),
        ({"round": {"fraction": 1.5}}, ["round.fraction must be a number above 0, at most 1", "got 1.5"]),
        (
            {"mode": "fedcybgd", "round": {"fraction": 0.5}},
            ["round.fraction = 0.5", "mode = fedcybgd", "one client trains in each round", "set it to 1"],
        ),
        (
            {"mode": "fedcybgd", "round": {"clients": 3, "quorum": 2}},
            ["round.quorum = 2 can never be reached with mode = fedcybgd", "set it to 1, or to 0"],
        ),
        *(
            (
                {"mode": "fedcybgd", "schedule": {"order": order}},
                [f"schedule.order = {order} does not go with mode = fedcybgd", "set schedule.order to cyclic or desc"],
            )
            for order in ("random", "importance")
        ),
        (
            {"mode": "fedcybgd", "round": {"late": "fold"}},
            ["round.late = fold does not go with mode = fedcybgd", "set round.late to discard"],
        ),
        ({"round": {"late_decay": 0.0}}, ["round.late_decay must be a number above 0, at most 1", "got 0.0"]),
        ({"round": {"quorum_lost_s": -1.0}}, ["round.quorum_lost_s must be a number at least 0", "got -1.0"]),
        ({"solver": {"warmup": 1.0}}, ["solver.warmup must be a number at least 0", "at most 0.99", "got 1.0"]),
        (
            {"network": {"timeout_s": 4.0, "heartbeat_s": 2.0}},
            ["network.timeout_s = 4.0 must be more than twice network.heartbeat_s = 2.0"],
        ),
        (
            {"network": {"timeout_s": 29.0}},
            ["network.timeout_s = 29.0 must be at least twice network.resend_s = 15.0", "raise the one or lower"],
        ),
        (
            {"network": {"window_bytes": 1 << 16, "chunk_bytes": 1 << 17}},
            ["network.window_bytes = 65536 is smaller than one chunk", "131072", "raise it"],
        ),
        (
            {"mode": "fedbcd", "solver": {"adaptive": True}},
            ["solver.adaptive", "mode = fedbcd hides none", "set solver.adaptive to false, or mode to parablock"],
        ),
        (
            {"solver": {"adaptive": True, "min_steps": 9, "max_steps": 8}},
            ["solver.min_steps = 9 is above solver.max_steps = 8", "lower the one or raise the other"],
        ),
        (
            {"solver": {"adaptive": True, "steps": 3, "min_steps": 4}},
            ["solver.steps = 3", "from solver.min_steps = 4 to solver.max_steps = 64", "widen the bounds"],
        ),
        ({"solver": {"adaptive": True, "steps": 65}}, ["solver.steps = 65", "to solver.max_steps = 64"]),
        (
            {"partition": {"method": "dirichlet"}},
            ["partition.method = dirichlet", "partition.field names none", "--set partition.field=task"],
        ),
        ({"partition": {"method": "field"}}, ["partition.method = field", "partition.field names none"]),
        ({"partition": {"alpha": 0}}, ["partition.alpha must be a number above 0, at most 1000000; got 0"]),
        (
            {"solver": {"momentum": 0.9}},
            ["solver.momentum = 0.9", "solver.optimizer = adamw", "momentum to 0, or solver.optimizer to sgd"],
        ),
        ({"solver": {"momentum": 0.9, "optimizer": "adafactor"}}, ["solver.optimizer = adafactor"]),
        ({"network": {"chunk_bytes": 65540}}, ["network.chunk_bytes = 65540 must be a multiple of 256"]),
        ({"network": {"chunk_bytes": 65537}}, ["network.chunk_bytes = 65537 must be a multiple of 256"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tree: dict[str, Any], facts: list[str]) -> None:
    refused(tree, *facts)


@pytest.mark.parametrize(
    "tree",
    [
        {"round": {"clients": 2, "quorum": 2}},
        {"mode": "fedavg", "round": {"late": "fold", "late_decay": 1.0, "deadline_s": 5.0}},
        {"round": {"quorum_lost": "stop", "quorum_lost_s": 0.0}},
        {"mode": "fedcybgd", "schedule": {"order": "descending"}},
        {"rounds": 4, "solver": {"warmup": 0.99}},
        {"network": {"window_bytes": 1 << 17, "chunk_bytes": 1 << 17}},
        {"solver": {"adaptive": True, "steps": 64, "min_steps": 64}},
        {"solver": {"steps": 65}},  # its bounds are for adaptive K only
        {"solver": {"momentum": 0.9, "optimizer": "sgd", "state": "keep"}},
        {"mode": "fedbcd", "solver": {"min_steps": 9, "max_steps": 8}},
        {"network": {"timeout_s": 4.1, "heartbeat_s": 2.0, "resend_s": 2.0}},
        {"network": {"timeout_s": 8.0, "resend_s": 4.0}},
        {"partition": {"method": "dirichlet", "field": "task", "alpha": 1e-9}},
        {"partition": {"method": "quantity", "field": ""}},
    ],
)
def test_settings_that_just_fit_are_taken(tree: dict[str, Any]) -> None:
    assert to_dict(from_dict(tree)).items() >= {k: v for k, v in tree.items() if not isinstance(v, dict)}.items()


def test_a_file_that_is_not_there_or_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config file .*none\.toml: No such file"):
        load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"cannot read the config file .*: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"rounds = ",
        b"rounds = 1\nrounds = 2\n",
        b"\xff\xfe",
        b"rounds = " + b"1" * 5000,
        b"rounds = " + b"[" * 5000,
    ],
    ids=["unfinished", "twice", "not UTF-8", "5,000 digits", "5,000 levels"],
)
def test_a_file_that_is_not_toml_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML: "):
        load(path)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@hypothesis_settings(max_examples=300)
@given(st.dictionaries(st.sampled_from([*sorted({path.split(".")[0] for path in LEAVES}), "x"]), json_like))
def test_whatever_comes_gives_a_config_or_a_config_error(tree: dict[str, Any]) -> None:
    # A worker reads the settings that the broker sends by the same function.
    config = outcome(tree)
    assert config
    if isinstance(config, Config):
        assert from_dict(to_dict(config)) == config


# What is listed


def test_keys_lists_every_setting_once_in_the_order_of_the_tree() -> None:
    assert [key.path for key in keys()] == list(LEAVES)
    for key in keys():
        hint, item = LEAVES[key.path]
        assert (key.default, key.unit, key.meaning) == (item.default, item.metadata["unit"], item.metadata["meaning"])
        assert key.meaning
        assert key.kind == settings._expected(item, hint)


def test_every_default_is_a_value_that_may_be_set() -> None:
    assert load(None, [f"{key.path}={toml_value(key.default)}" for key in keys()]) == Config()


def test_what_stays_on_its_machine_is_not_shared() -> None:
    local = {key.path for key in keys() if key.local}
    assert local == {"trust_remote_code", "data.train", "data.eval", "network.bind", "journal.keep"}
    shared = to_dict(from_dict({"data": {"train": "/secret"}}), shared_only=True)
    for path in LEAVES:
        node: Any = shared
        *tables, name = path.split(".")
        for table in tables:
            node = node[table]
        assert (name in node) == (path not in local)
    assert from_dict(shared).data.train == "builtin"


# parablock config


def test_explain_prints_every_key_default_unit_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert config_command.main(["--explain"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")}
    assert rows >= set(LEAVES)
    # On a terminal that is wide enough no cell is broken into lines, and each can be read as it is.
    wide = Console(file=io.StringIO(), width=1000)
    wide.print(config_command._explained())
    assert isinstance(wide.file, io.StringIO)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in wide.file.getvalue().splitlines()]
    table = {row[0]: row[1:] for row in cells if row}
    for key in keys():
        default = str(key.default).lower() if isinstance(key.default, bool) else str(key.default)
        meaning = key.meaning + " (stays on its machine)" * key.local
        assert table[key.path] == [default, key.unit, key.kind, meaning]


def test_the_command_prints_the_resolved_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text("rounds = 7\n", encoding="utf-8")
    assert config_command.main([str(path), "--set", "solver.lr=0.5", "--set", "seed=1"]) == 0
    assert from_dict(tomllib.loads(capsys.readouterr().out)) == load(path, ["solver.lr=0.5", "seed=1"])


def test_the_command_tells_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert config_command.main(["--set", "solver.stepz=1"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("parablock config: there is no setting solver.stepz. Did you mean solver.steps?")


def test_text_is_bounded() -> None:
    assert load(None, [f"data.template={'x' * 4096}"]).data.template == "x" * 4096
    with pytest.raises(ConfigError, match=r"data\.template has 4097 characters"):
        load(None, [f"data.template={'x' * 4097}"])


def test_a_setting_of_earlier_versions_is_passed_over_at_its_default_and_refused_elsewhere() -> None:
    before = {**to_dict(from_dict({})), "solver": {"warmup_rounds": 0, "steps": 3}}
    assert from_dict(before) == from_dict({"solver": {"steps": 3}})
    check_resumed(before, from_dict(before))
    message = refused({"solver": {"warmup_rounds": 8}}, "solver.warmup_rounds = 8", "it is solver.warmup now")
    assert "goes on with the version of parablock that began it" in message


def test_a_resumed_run_may_differ_only_where_nothing_depends_on_it() -> None:
    before = to_dict(from_dict({"rounds": 9, "model": "here"}))
    check_resumed(before, from_dict(before))
    check_resumed(before, from_dict({**before, "journal": {"keep": 5}, "network": {"bind": "tcp://127.0.0.1:*"}}))
    for changed, named in (
        ({"rounds": 10}, "rounds was 9 when the run began, and would be 10 now; leave it as it was"),
        ({"model": "there"}, 'model was "here" when the run began, and would be "there" now'),
        ({"server": {"lr": 0.5}}, "server.lr was 1.0 when .*what may change: .*journal.keep.*round.deadline_s"),
        ({"network": {"chunk_bytes": 65536}}, "network.chunk_bytes was 2097152"),
    ):
        with pytest.raises(ConfigError, match=named):
            check_resumed(before, from_dict({**before, **changed}))
    del before["journal"]  # as of a run that is older than the key
    check_resumed(before, from_dict(before))


def test_what_may_change_are_settings() -> None:
    assert {key.path for key in keys()} >= MAY_CHANGE
