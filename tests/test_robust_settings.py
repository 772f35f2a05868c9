"""The settings of robust aggregation: what they come to, and what they are refused with."""

from __future__ import annotations

from typing import Any

import pytest

from parablock.config import ConfigError, from_dict


def tree_of(rule: str, bad: int, clients: int, top: dict[str, Any] | None = None, **round: Any) -> dict[str, Any]:
    return {"robust": {"rule": rule, "bad": bad}, "round": {"clients": clients, **round}, **(top or {})}


@pytest.mark.parametrize(
    ("rule", "bad", "clients", "quorum"),
    [("median", 1, 3, 3), ("trimmed-mean", 2, 9, 5), ("krum", 1, 5, 5), ("multi-krum", 2, 20, 11)],
)
def test_the_quorum_is_what_the_rule_needs_unless_more_is_usual(rule: str, bad: int, clients: int, quorum: int) -> None:
    assert from_dict(tree_of(rule, bad, clients)).quorum == quorum


def test_a_block_is_measured_where_whole_contributions_must_be_seen() -> None:
    measured = [
        ({"rule": "krum", "bad": 1}, True),
        ({"rule": "multi-krum", "bad": 1}, True),
        ({"clip": 1.0}, True),
        ({"rule": "median", "bad": 1, "clip_ratio": 2.0}, True),
        ({"rule": "median", "bad": 1}, False),
        ({"rule": "trimmed-mean", "bad": 1}, False),
        ({}, False),
    ]
    for robust, expected in measured:
        assert from_dict({"robust": robust, "round": {"clients": 5}}).measured is expected


def test_how_many_multi_krum_takes() -> None:
    default = from_dict(tree_of("multi-krum", 1, 7)).robust
    assert [default.count(number, 1) for number in (5, 6, 7)] == [2, 3, 4]
    fewer = from_dict(tree_of("multi-krum", 1, 7) | {"robust": {"rule": "multi-krum", "bad": 1, "chosen": 3}}).robust
    assert [fewer.count(number, 1) for number in (5, 6, 7)] == [2, 3, 3]
    assert from_dict(tree_of("krum", 1, 7)).robust.count(7, 1) == 1


def test_who_sent_what_is_not_finite_is_one_of_the_bad() -> None:
    robust = from_dict(tree_of("krum", 2, 7)).robust
    assert [robust.still_bad(refused) for refused in range(4)] == [2, 1, 0, 0]
    assert robust.too_few(7, 0) is None
    assert robust.too_few(6, 0) is not None
    assert robust.too_few(5, 1) is None
    assert robust.too_few(4, 1) == (
        "robust.rule = krum with robust.bad = 2 makes nothing of fewer than 5 contributions beside 1 that are not "
        "finite, and 4 came"
    )


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        (tree_of("median", 0, 5), "robust.rule = median with robust.bad = 0 would bear no bad client; set robust.bad"),
        (tree_of("mean", 1, 5), "robust.bad = 1 with robust.rule = mean, which bears no bad client; set robust.rule"),
        (tree_of("median", 1, 2), "needs at least 3 contributions a round, and 2 clients train in one; lower"),
        (tree_of("trimmed-mean", 2, 4), "needs at least 5 contributions a round, and 4 clients"),
        (tree_of("krum", 1, 4), "needs at least 5 contributions a round, and 4 clients"),
        (tree_of("multi-krum", 2, 6), "needs at least 7 contributions a round, and 6 clients"),
        (tree_of("median", 1, 4, fraction=0.5), "and 2 of round.clients = 4 clients train in one"),
        (tree_of("median", 2, 5, quorum=4), "round.quorum = 4 lets a round close with fewer; raise round.quorum to 5"),
        (tree_of("median", 1, 5, quorum_lost="fewer"), "round.quorum_lost = fewer does not go with robust.rule = med"),
        (tree_of("median", 1, 5, late="fold"), "round.late = fold does not go with robust.rule = median"),
        (tree_of("krum", 1, 5, {"solver": {"adaptive": True}}), "solver.adaptive does not go with robust.rule = krum"),
        (tree_of("median", 1, 5, {"mode": "fedcybgd"}), "does not go with mode = fedcybgd"),
        (tree_of("krum", 1, 5) | {"robust": {"rule": "krum", "bad": 1, "chosen": 2}}, "is for multi-krum only"),
        (
            tree_of("multi-krum", 1, 6) | {"robust": {"rule": "multi-krum", "bad": 1, "chosen": 4}},
            "robust.chosen = 4 is more than the 3 of 6 contributions",
        ),
        ({"robust": {"clip": 1.0, "clip_ratio": 1.0}}, "robust.clip and robust.clip_ratio exclude each other"),
        ({"robust": {"clip": -1.0}}, "robust.clip must be a number at least 0"),
        ({"robust": {"rule": "best"}}, "robust.rule must be one of mean, median, trimmed-mean, krum, multi-krum"),
    ],
)
def test_what_cannot_be_borne_is_refused(tree: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(tree)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("mode", ["parablock", "fedbcd", "fedavg", "lora", "ffa-lora", "lisa"])
@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "multi-krum"])
def test_every_mode_in_which_clients_train_the_same_has_every_rule(mode: str, rule: str) -> None:
    assert from_dict(tree_of(rule, 1, 5, {"mode": mode})).robust.rule == rule
