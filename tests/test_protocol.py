"""The two machines joined: clean runs, chosen mishaps, and a hundred histories in which much goes wrong at once.

The invariants are asserted after each event by `tests.network`; the tests say what must come of a history as a whole.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from parablock import coordinator_events as broker
from parablock import participant_events as worker
from parablock.aggregation import server_move, weighted_mean
from parablock.messages import Abstain, Chunk, Commit, Hello, Landed, Offer, Rejected, Rejoin, Start
from parablock.participant_events import End
from parablock.wire import Envelope
from tests.histories import drawn, failures, history, outcome, replay
from tests.network import POINTS, RUN, VARYING, Faults, Habits, Incident, Network, config_of

if TYPE_CHECKING:
    import random

STEADY = Habits(seconds=(1.0, 1.0))


def ended(network: Network) -> Network:
    network.run().check_ended()
    return network


def contributors(network: Network) -> list[str]:
    return ["".join(committed.contributors) for committed in network.committed]


# Clean runs


@pytest.mark.parametrize("mode", ["fedbcd", "parablock", "lisa"])
@pytest.mark.parametrize("clients", [1, 3])
def test_without_mishaps_everybody_trains_every_round_and_each_counts(mode: str, clients: int) -> None:
    config = config_of(clients, rounds=10, mode=mode)
    network = ended(Network(config, dict.fromkeys("abc"[:clients], STEADY)))
    assert contributors(network) == ["abc"[:clients]] * 10
    assert all(process.trained == list(range(10)) for process in network.processes)
    assert all(process.uploaded == list(range(10)) for process in network.processes)
    assert all(process.arrived == set(range(10)) for process in network.processes)
    assert not any(process.dismissed for process in network.processes)
    sent = Counter(type(message) for *_, message in network.sent)
    assert sent[Offer] == sent[Commit] == 10 * clients, "nothing is said twice"
    assert sent[Rejected] == sent[Rejoin] == sent[Landed] == 0
    assert network.now < 20.0


def test_the_overlap_hides_the_link() -> None:
    """Rounds of a second over a link of up to half a second a message: the synchronous mode pays for it each round."""
    seconds = {}
    for mode in ("fedbcd", "parablock"):
        faults = Faults(delay_s=(0.2, 0.2))
        network = ended(Network(config_of(2, rounds=12, mode=mode), {"a": STEADY, "b": STEADY}, faults))
        seconds[mode] = network.over_at
    assert seconds["parablock"] < seconds["fedbcd"] - 6.0


def test_a_block_comes_down_while_it_still_goes_up() -> None:
    """Three chunks, one at a time under way: they go down one behind the other way, not after it."""
    faults = Faults(delay_s=(0.1, 0.1))
    config = config_of(2, rounds=4, window=1024, schedule={"order": "descending"})
    network = ended(Network(config, {"a": STEADY, "b": STEADY}, faults))
    up, down = (
        [s.at for s in network.sent if s.up is up and isinstance(s.message, Chunk) and s.message.round == 0]
        for up in (True, False)
    )
    commit = next(s.at for s in network.sent if isinstance(s.message, Commit) and s.message.round == 0)
    assert len(up) == len(down) == 6, "nothing is sent twice"
    assert sum(at < up[-1] for at in down) >= 2, "the first chunks are on their way before the last one has left"
    assert sum(at < commit for at in down) >= 4


@pytest.mark.parametrize("down", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("error_feedback", [False, True])
def test_whatever_the_codec_every_client_holds_the_brokers_model(down: str, error_feedback: bool) -> None:
    codec = {"up": "int8", "down": down, "error_feedback": error_feedback}
    habits = {"a": STEADY, "b": STEADY, "c": Habits(seconds=(1.0, 1.0), joins_at=9.3)}
    faults = Faults(incidents=(Incident("kill", "a", at=6.0, lasts=4.0),))
    network = ended(Network(config_of(2, rounds=12, codec=codec, server={"optimizer": "nesterov"}), habits, faults))
    model = {block: network.values[made] for block, (made, _) in network.process("b").blocks.items()}
    assert all({b: content for b, (_, content) in p.blocks.items()} == model for p in network.processes if not p.dead)
    sent = Counter(s.message.attempt > 0 for s in network.sent if isinstance(s.message, Commit) and not s.up)
    assert (sent[False] > 0) == (down != "float32"), "only then there are blocks in full, for the newcomers"


def test_the_order_of_arrival_does_not_change_a_bit() -> None:
    outcomes = set()
    for seed in range(6):
        habits = {name: Habits(seconds=(0.1, 2.0)) for name in "abcd"}
        faults = Faults(delay_s=(0.001, 0.4), ordered=False)
        network = Network(config_of(4, rounds=8, server={"optimizer": "nesterov"}), {}, faults, seed)
        for name, kind in habits.items():
            network.join(name, kind)  # at once, so that their tokens, and with them their deltas, are always the same
        outcomes.add(tuple(ended(network).values))
    assert len(outcomes) == 1


def test_the_fold_is_the_weighted_mean_of_what_was_made() -> None:
    network = ended(Network(config_of(3, rounds=5, solver=VARYING), dict.fromkeys("abc", STEADY)))
    x = [np.zeros(block.numel, np.float32) for block in network.manifest.blocks]
    for committed in network.committed:
        made = [network.made[name, committed.round][0] for name in "abc"]
        weights = [each.weight for each in made]
        deltas = [np.frombuffer(each.values, np.float32) for each in made]
        folded = weighted_mean(deltas, weights, [each.steps for each in made])
        move, _ = server_move(network.config.server, folded, {})
        x[committed.block] = x[committed.block] + move
        assert x[committed.block].tobytes() == network.values[committed.round]
        # FedNova: the mean of the deltas per step, by tokens, times the effective number of steps.
        steps, tokens = np.array([each.steps for each in made], np.float64), np.array(weights, np.float64)
        p = tokens / tokens.sum()
        mean = (p @ steps) * (p / steps) @ np.array(deltas, np.float64)
        np.testing.assert_allclose(folded, mean, rtol=0, atol=5e-6)


@pytest.mark.parametrize("rule", ["mean", "median", "trimmed-mean", "krum", "multi-krum"])
@pytest.mark.parametrize("up", ["float32", "int8"])
def test_by_each_rule_the_model_is_what_it_makes_of_the_contributions(rule: str, up: str) -> None:
    """That it is, is looked at after each event. One or three send a NaN, which leaves enough of the others, or have
    nothing to give, which does not."""
    spoils = {"a": {2, 4}, "b": {4}, "c": {4}}
    habits = {
        name: Habits((0.5, 1.5), frozenset({5} if name in "bcd" else ()), frozenset(spoils.get(name, ())))
        for name in "abcdefg"
    }
    bad = int(rule != "mean") * (2 if rule in ("median", "trimmed-mean") else 1)
    settings = {"robust": {"rule": rule, "bad": bad, "clip_ratio": 0.95}, "codec": {"up": up}}
    network = ended(Network(config_of(7, rounds=8, **settings), habits))
    counted = {"krum": 1, "multi-krum": 4}.get(rule, 7)
    assert [len(names) for names in contributors(network)[:2]] == [counted] * 2
    assert "a" not in network.committed[2].counted
    assert len(network.committed[0].left_out) == 7 - counted
    empty = [round for round, names in enumerate(contributors(network)) if not names]
    assert empty == ([5] if rule != "mean" else [])
    assert network.values[4] is not None
    assert any(entry.clipped for entry in network.committed)


@pytest.mark.parametrize("rule", ["krum", "multi-krum"])
@pytest.mark.parametrize("seed", range(3))
def test_who_is_chosen_is_so_whatever_befalls_broker_and_clients(rule: str, seed: int) -> None:
    """Among others: the broker is killed between a verdict and its commit, and a client while it is left out."""
    incidents = (
        Incident("kill", "broker", at=3.0, lasts=1.0, point=POINTS[seed % len(POINTS)]),
        Incident("kill", "c", at=5.0, lasts=4.5, kept=True),
        Incident("cut", "d", at=7.0, lasts=2.0),
        Incident("disk", "broker", at=8.0, lasts=1.5),
    )
    faults = Faults(loss=0.05, duplication=0.1, echo=0.05, delay_s=(0.001, 0.3), ordered=False, incidents=incidents)
    habits = {name: Habits(spoils=frozenset({4} if name == "b" else ())) for name in "abcdef"}
    settings = {"robust": {"rule": rule, "bad": 1}, "deadline_s": 3.0, "server": {"optimizer": "nesterov"}}
    network = ended(Network(config_of(6, rounds=10, **settings), habits, faults, seed))
    assert network.broker.epoch == 2
    assert sum(bool(entry.left_out) for entry in network.committed) >= 8


# What the broker announces


def test_rounds_that_follow_from_the_settings_are_announced_by_nothing() -> None:
    network = ended(Network(config_of(2, rounds=6), {"a": STEADY, "b": STEADY}))
    assert network.told == {}


@pytest.mark.parametrize("in_flight", [1, 2])
def test_by_importance_the_block_that_moves_more_comes_more_often(in_flight: int) -> None:
    """The means differ in length, as the clients' tokens and steps do from round to round."""
    settings = {"schedule": {"order": "importance"}, "pipeline": {"max_in_flight": in_flight}, "solver": VARYING}
    network = ended(Network(config_of(3, rounds=40, **settings), dict.fromkeys("abc", STEADY)))
    blocks = [committed.block for committed in network.committed]
    assert blocks[:4] == [3, 2, 1, 0]
    assert len(set(zip(blocks[4:], blocks[5:], blocks[6:], strict=False))) > 4, "it is no cycle"
    for first in range(40 - in_flight):
        assert len(set(blocks[first : first + in_flight + 1])) == in_flight + 1
    for first in range(40 - 8):
        assert set(blocks[first : first + 8]) == {0, 1, 2, 3}
    assert contributors(network) == ["abc"] * 40


def test_an_announcement_costs_no_time() -> None:
    """Rounds of a second over a link of 0.2 s a message are as long as where nothing is announced."""
    ends = []
    for order in ("descending", "importance"):
        faults = Faults(delay_s=(0.2, 0.2))
        config = config_of(2, rounds=12, schedule={"order": order})
        ends.append(ended(Network(config, {"a": STEADY, "b": STEADY}, faults)).over_at)
    assert ends[1] == pytest.approx(ends[0], abs=0.5)


@pytest.mark.parametrize("mode", ["parablock", "fedbcd"])
def test_half_of_the_clients_train_and_all_hold_the_model(mode: str) -> None:
    network = ended(Network(config_of(4, rounds=16, fraction=0.5, mode=mode), dict.fromkeys("abcd", STEADY)))
    assert all(len(names) == 2 for names in contributors(network))
    assert len(set(contributors(network))) > 3
    for process in network.processes:
        mine = [round for round, names in enumerate(contributors(network)) if process.name in names]
        assert process.trained == process.uploaded == mine
        assert process.arrived == set(range(16))


def test_clients_take_blocks_in_a_cycle_one_a_round() -> None:
    """Two clients and four blocks share a factor: without a shift a would never train blocks 1 and 3."""
    network = ended(Network(config_of(2, rounds=8, mode="fedcybgd"), {"a": STEADY, "b": STEADY}))
    assert contributors(network) == ["a", "b", "a", "b", "b", "a", "b", "a"]
    pairs = {
        (names, committed.block) for names, committed in zip(contributors(network), network.committed, strict=True)
    }
    assert len(pairs) == 8


def test_a_late_joiner_hears_what_is_decided_and_is_drawn_from_then_on() -> None:
    habits = {"a": STEADY, "b": STEADY, "c": Habits(seconds=(1.0, 1.0), joins_at=3.3)}
    settings = {"schedule": {"order": "importance"}, "fraction": 0.5}
    network = ended(Network(config_of(2, rounds=24, **settings), habits))
    (start,) = network.starts["c"][:1]
    assert len(start.blocks) == len(start.trains) == 2
    assert start.trains == (False, False), "those rounds were drawn before it came"
    assert {"a", "b", "c"} == set("".join(contributors(network)[start.round :]))


def test_a_round_whose_clients_are_gone_is_closed_and_the_run_goes_on() -> None:
    """One of three is drawn. While it is away its rounds change nothing, and nobody waits beyond the timeout."""
    faults = Faults(incidents=(Incident("kill", "b", at=4.2, lasts=0.0, returns=False),))
    network = ended(Network(config_of(3, rounds=30, fraction=0.3, quorum=1), dict.fromkeys("abc", STEADY), faults))
    names = contributors(network)
    assert ("lost", "b") in [(note.kind, note.client) for note in network.notes]
    empty = [round for round, name in enumerate(names) if not name]
    assert len(empty) <= 2, "those that were decided when it went"
    assert set(names[empty[-1] + 1 if empty else 10 :]) == {"a", "c"}
    assert network.over_at < 30 + 8.0


def test_a_newcomer_makes_up_for_those_who_were_drawn_and_are_gone() -> None:
    """Both are drawn for each round, one goes for good: a third one lets the rounds at hand go on."""
    faults = Faults(incidents=(Incident("kill", "b", at=4.2, lasts=0.0, returns=False),))
    habits = {"a": STEADY, "b": STEADY, "c": Habits(seconds=(1.0, 1.0), joins_at=20.0)}
    network = ended(Network(config_of(2, rounds=8, fraction=0.9), habits, faults))
    (start,) = network.starts["c"][:1]
    assert start.round == start.next, "the quorum needs it at once"
    assert start.trains == (True, True)
    assert contributors(network)[start.next :] == ["ac"] * (8 - start.next)


# Chosen mishaps


def test_a_late_joiner_gets_the_blocks_that_changed_and_nobody_waits_for_it() -> None:
    habits = {"a": STEADY, "b": STEADY, "c": Habits(seconds=(1.0, 1.0), joins_at=3.3)}
    network = ended(Network(config_of(2, rounds=10), habits))
    late = network.process("c")
    start = network.starts["c"][0]
    assert 1 <= start.next <= 4
    assert start.round == start.next + 2
    assert late.trained[0] == start.round
    assert late.arrived == {*start.pending, *range(start.next, 10)}
    assert contributors(network) == ["ab"] * start.round + ["abc"] * (10 - start.round)
    alone = ended(Network(config_of(2, rounds=10), {"a": STEADY, "b": STEADY}))
    assert network.over_at < alone.over_at + 0.5


@pytest.mark.parametrize("joins_at", [2.0, 2.3, 2.6, 2.9, 3.2])
def test_a_late_joiner_of_lisa_begins_with_what_is_trained_at_once(joins_at: float) -> None:
    """It gets the newest of each block; in the round of a pair that it cannot train the first of it abstains."""
    habits = {"a": STEADY, "b": STEADY, "c": Habits(seconds=(1.0, 1.0), joins_at=joins_at)}
    network = ended(Network(config_of(2, rounds=12, mode="lisa"), habits))
    late, start = network.process("c"), network.starts["c"][0]
    newest = {network.block(round): round for round in range(start.next)}
    assert set(start.pending) == set(newest.values())
    assert late.trained == list(range(start.round + start.round % 2, 12))
    abstained = [message.round for _, name, _, message in network.sent if isinstance(message, Abstain) and name == "c"]
    assert set(abstained) == ({start.round} if start.round % 2 else set())
    assert contributors(network) == ["ab"] * late.trained[0] + ["abc"] * len(late.trained)


@pytest.mark.parametrize(("in_flight", "seed"), [(1, 23), (2, 7)], ids=["one in flight", "two in flight"])
def test_a_change_that_overtakes_the_one_before_lands_after_it(in_flight: int, seed: int) -> None:
    """The others are so much faster that two versions of a block are on their way to the slow one at once."""
    settings = {
        "codec": {"down": "int8"},
        "pipeline": {"land": "arrival", "max_in_flight": in_flight},
        "schedule": {"order": "random"},
    }
    config = config_of(3, rounds=14, deadline_s=0.3, quorum=1, window=1024, **settings)
    quick = Habits(seconds=(0.1, 0.3))
    habits = {"a": quick, "b": quick, "c": Habits(seconds=(2.0, 6.0))}
    ended(Network(config, habits, Faults(delay_s=(0.001, 0.5), ordered=False), seed))


def test_a_straggler_is_told_and_skips_to_where_the_others_are() -> None:
    habits = {"a": STEADY, "b": STEADY, "c": Habits(seconds=(3.0, 3.0))}
    network = ended(Network(config_of(3, rounds=12, deadline_s=0.5), habits))
    slow = network.process("c")
    assert contributors(network).count("ab") >= 6
    assert len(slow.trained) < 12, "it skips"
    missed = [round for round in slow.trained if "c" not in network.committed[round].contributors]
    assert missed
    assert set(slow.dismissed) == set(missed)
    assert network.over_at < 40.0


def with_an_uneven_one(seconds: tuple[float, float], mode: str = "parablock", grace: bool = True) -> Network:
    """a and b train for a second, c as it comes; the deadline is short."""
    habits = {"a": STEADY, "b": STEADY, "c": Habits(seconds=seconds)}
    config = config_of(3, rounds=12, deadline_s=0.05, mode=mode, policy={"grace": grace})
    return ended(Network(config, habits))


def test_where_waiting_costs_nothing_the_slow_one_is_still_counted() -> None:
    """It is up to half a second slower than the others, who have a second until they need the block."""
    strict, kind = (with_an_uneven_one((0.5, 1.5), grace=grace) for grace in (False, True))
    assert contributors(strict).count("abc") < 3
    assert contributors(kind)[:-1] == ["abc"] * 11, "nothing is trained after the last round: it has no slack"
    assert kind.over_at < strict.over_at + 0.5


def test_where_waiting_costs_something_the_deadline_holds() -> None:
    """c takes longer than all the slack there is; and in the synchronous mode there is none."""
    slow = with_an_uneven_one((3.0, 3.0))
    assert contributors(slow)[:2] == ["ab", "ab"]
    assert slow.over_at < with_an_uneven_one((3.0, 3.0), grace=False).over_at + 0.5
    outcomes = [with_an_uneven_one((0.5, 1.5), "fedbcd", grace) for grace in (False, True)]
    assert contributors(outcomes[0]) == contributors(outcomes[1])
    assert "ab" in contributors(outcomes[1])


def test_a_round_waits_for_the_quorum_and_a_newcomer_restores_it() -> None:
    faults = Faults(incidents=(Incident("kill", "b", at=4.2, lasts=30.0),))
    network = ended(Network(config_of(2, rounds=6), {"a": STEADY, "b": STEADY}, faults))
    assert network.over_at > 34.0, "without b there is no quorum"
    assert contributors(network) == ["ab"] * 6
    assert network.processes[-1].trained[0] == network.starts["b"][-1].next, "it begins with the round at hand"


def test_a_quorum_that_does_not_come_back_is_done_without_where_that_is_the_policy() -> None:
    faults = Faults(incidents=(Incident("kill", "b", at=4.2, lasts=0.0, returns=False),))
    policy = {"quorum_lost": "fewer", "quorum_lost_s": 5.0}
    network = ended(Network(config_of(2, rounds=8, policy=policy), {"a": STEADY, "b": STEADY}, faults))
    names = contributors(network)
    assert set(names) == {"ab", "a"}
    assert names == sorted(names, reverse=True), "no round before it was given up has closed without the quorum"
    assert "only 1 of at least 2 clients are there" in network.committed[-1].reason
    told = [note.text for note in network.notes if note.kind == "quorum"]
    assert len(told) == 2, "that it is missing, and that it is done without"
    assert 4.2 + 5.0 + 5.0 < network.over_at < 4.2 + 6.0 + 5.0 + 8.0


@pytest.mark.parametrize(
    ("fraction", "diverges"), [(0.5, ()), (1.0, (6,))], ids=["who was drawn is gone", "the last one has diverged"]
)
def test_who_is_left_does_not_wait_for_a_contribution_that_nobody_will_make(
    fraction: float, diverges: tuple[int, ...]
) -> None:
    policy = {"quorum_lost": "fewer", "quorum_lost_s": 8.0}
    config = config_of(4, rounds=12, quorum=2, fraction=fraction, policy=policy)
    faults = Faults(incidents=tuple(Incident("kill", name, at=6.0, lasts=0.0, returns=False) for name in "abc"))
    habits = dict.fromkeys("abc", Habits()) | {"d": Habits(diverges=frozenset(diverges))}
    names = contributors(ended(Network(config, habits, faults)))
    assert "" in names
    assert names[-1] == "d"


def test_a_quorum_that_does_not_come_back_stops_the_run_where_that_is_the_policy() -> None:
    faults = Faults(incidents=(Incident("kill", "b", at=4.2, lasts=0.0, returns=False),))
    policy = {"quorum_lost": "stop", "quorum_lost_s": 5.0}
    network = Network(config_of(2, rounds=8, policy=policy), {"a": STEADY, "b": STEADY}, faults).run()
    assert network.over is not None
    assert not network.over.complete
    assert "1 of at least 2 clients are there, for 5 s; the run stops" in network.over.reason
    gone = network.process("a").gone
    assert gone is not None
    assert (gone.end, "the run stops" in gone.reason) == (End.LOST, True)
    assert set(contributors(network)) == {"ab"}, "nothing was committed in part"
    assert network.over_at < 4.2 + 6.0 + 5.0 + 1.0


def test_a_death_that_leaves_a_quorum_holds_the_others_up_for_the_timeout_only() -> None:
    faults = Faults(incidents=(Incident("kill", "c", at=4.2, lasts=0.0, returns=False),))
    network = ended(Network(config_of(3, rounds=8), dict.fromkeys("abc", STEADY), faults))
    assert contributors(network)[-1] == "ab"
    assert network.over_at < 11.0 + 6.0
    assert ("lost", "c") in [(note.kind, note.client) for note in network.notes]


def test_those_who_begin_later_keep_a_run_going_when_the_others_die() -> None:
    """c joins while a and b train, b dies: a and c are a quorum, though c takes no part in the rounds at hand."""
    faults = Faults(incidents=(Incident("kill", "b", at=5.1, lasts=0.0, returns=False),))
    habits = {"a": STEADY, "b": STEADY, "c": Habits(seconds=(1.0, 1.0), joins_at=3.5)}
    network = ended(Network(config_of(2, rounds=10), habits, faults))
    assert "a" in contributors(network)
    assert contributors(network)[-1] == "ac"


def test_a_contribution_that_is_not_finite_is_rejected_and_the_run_goes_on() -> None:
    habits = {"a": Habits(seconds=(1.0, 1.0), spoils=frozenset({2, 3})), "b": STEADY}
    network = ended(Network(config_of(2, rounds=6), habits))
    assert contributors(network) == ["ab", "ab", "b", "b", "ab", "ab"]
    assert {r: "not finite" in reason for r, reason in network.process("a").dismissed.items()} == {2: True, 3: True}
    assert all(np.isfinite(np.frombuffer(value, np.float32)).all() for value in network.values if value is not None)


def test_a_round_that_nobody_can_contribute_to_leaves_the_block_as_it_was() -> None:
    network = ended(Network(config_of(1, rounds=6), {"a": Habits(spoils=frozenset({1}), diverges=frozenset({4}))}))
    assert contributors(network) == ["a", "", "a", "a", "", "a"]
    assert [network.values[1], network.values[4]] == [None, None]
    assert {message.round for *_, message in network.sent if isinstance(message, Abstain)} == {4}


def test_a_process_that_takes_over_a_name_does_not_mix_with_the_one_before() -> None:
    network = Network(config_of(2, rounds=8), {"a": STEADY, "b": STEADY})
    network.after(4.0, lambda: network.join("b", STEADY))
    network.run()
    first, second = (process for process in network.processes if process.name == "b")
    assert first.gone == worker.Gone(End.REFUSED, "another worker has joined under the name b")
    assert second.gone is not None
    assert second.gone.end is End.DONE
    assert network.coordinator.next_round == 8


@pytest.mark.parametrize(("habits", "says"), [(Habits(base="0"), "its weights"), (Habits(rows=0), "no training rows")])
def test_a_worker_that_does_not_match_is_refused_and_the_others_go_on(habits: Habits, says: str) -> None:
    network = Network(config_of(2, rounds=4), {"a": STEADY, "b": STEADY, "x": habits}).run()
    stranger = network.process("x")
    assert stranger.gone is not None
    assert stranger.gone.end is End.REFUSED
    assert says in stranger.gone.reason
    assert contributors(network) == ["ab"] * 4


@pytest.mark.parametrize("lasts", [3.0, 9.0], ids=["within the timeout", "beyond the timeout"])
@pytest.mark.parametrize("victim", ["broker", "a"])
def test_a_process_that_was_stopped_for_a_while_goes_on(victim: str, lasts: float) -> None:
    faults = Faults(incidents=(Incident("freeze", victim, at=4.2, lasts=lasts),))
    network = ended(Network(config_of(2, rounds=8), {"a": STEADY, "b": STEADY}, faults))
    assert contributors(network) == ["ab"] * 8
    assert all(process.trained == list(range(8)) for process in network.processes), "nothing is trained twice"


@pytest.mark.parametrize("lasts", [1.0, 9.0], ids=["within the timeout", "beyond the timeout"])
@pytest.mark.parametrize("at", np.arange(4.0, 5.2, 0.1).round(2))
def test_a_cut_at_any_moment_costs_no_contribution(at: float, lasts: float) -> None:
    faults = Faults(delay_s=(0.04, 0.06), incidents=(Incident("cut", "a", at=at, lasts=lasts),))
    network = ended(Network(config_of(2, rounds=8), {"a": STEADY, "b": STEADY}, faults))
    assert contributors(network) == ["ab"] * 8
    uploaded = Counter((name, round) for (name, round), made in network.made.items() for _ in made)
    assert set(uploaded.values()) == {1}, "nothing is trained twice"


def cut_within_a_transfer(up: bool) -> tuple[Network, Counter[int]]:
    """Round 3, of three chunks: the third is lost with the connection. Returns how often each offset was sent."""

    def chunks(network: Network) -> list[tuple[float, int]]:
        sent = [s for s in network.sent if s.client == "a" and s.up == up and isinstance(s.message, Chunk)]
        return [(s.at, s.message.offset) for s in sent if s.message.round == 3]

    config, faults = config_of(2, rounds=6), Faults(delay_s=(0.3, 0.3))
    clean = chunks(ended(Network(config, {"a": STEADY, "b": STEADY}, faults)))
    assert [offset for _, offset in clean] == [0, 1024, 2048]
    incident = Incident("cut", "a", at=clean[2][0] - 0.01, lasts=9.0)
    faults = Faults(delay_s=(0.3, 0.3), incidents=(incident,))
    network = ended(Network(config, {"a": STEADY, "b": STEADY}, faults))
    assert any((note.kind, note.client) == ("lost", "a") for note in network.notes)
    return network, Counter(offset for _, offset in chunks(network))


def test_an_upload_that_was_cut_goes_on_where_it_was_and_counts_once() -> None:
    network, sent = cut_within_a_transfer(up=True)
    assert sent[0] == sent[1024] == 1, "the broker still holds them"
    assert sent[2048] > 1
    assert contributors(network) == ["ab"] * 6


def test_a_download_that_was_cut_goes_on_where_it_was() -> None:
    network, sent = cut_within_a_transfer(up=False)
    assert sent[0] == sent[1024] == 1, "the worker still holds them"
    assert sent[2048] > 1
    assert contributors(network) == ["ab"] * 6


@pytest.mark.parametrize("point", ["", *POINTS])
@pytest.mark.parametrize("down", ["float32", "int8"])
def test_a_broker_that_dies_at_any_point_of_a_commit_costs_no_contribution(point: str, down: str) -> None:
    """After it is back clients train on within 5 s, and nothing is trained twice."""
    faults = Faults(incidents=(Incident("kill", "broker", at=4.2, lasts=3.0, point=point),))
    config = config_of(2, rounds=8, codec={"down": down}, server={"optimizer": "yogi"})
    network = ended(Network(config, {"a": STEADY, "b": STEADY}, faults))
    assert network.broker.epoch == 2
    assert network.crashed == ([point] if point else [])
    assert contributors(network) == ["ab"] * 8
    assert all(process.trained == list(range(8)) for process in network.processes)
    assert not any(process.dismissed for process in network.processes)
    clean = ended(Network(config, {"a": STEADY, "b": STEADY}))
    assert network.values == clean.values, "the model is that of an undisturbed run"
    assert network.over_at < clean.over_at + 3.0 + 5.0


@pytest.mark.parametrize("at", [4.3, 4.9, 5.02])
def test_a_worker_that_is_killed_goes_on_from_what_it_has_kept(at: float) -> None:
    """It trains no round again that it has contributed to, and gets only the blocks that have changed since."""
    faults = Faults(incidents=(Incident("kill", "b", at=at, lasts=4.0, kept=True),))
    network = ended(Network(config_of(2, rounds=8), {"a": STEADY, "b": STEADY}, faults))
    assert contributors(network) == ["ab"] * 8
    before, after = (process for process in network.processes if process.name == "b")
    assert after.kept is not None
    assert after.trained[0] == after.kept.position
    assert len(before.trained) + len(after.trained) <= 9, (
        "that one which was being trained, or encoded, is trained anew"
    )
    assert len(network.starts["b"][-1].pending) <= 2


def test_a_full_disk_delays_the_run_and_loses_nothing() -> None:
    faults = Faults(incidents=(Incident("disk", "broker", at=4.2, lasts=5.0),))
    network = ended(Network(config_of(2, rounds=8), {"a": STEADY, "b": STEADY}, faults))
    assert network.retries >= 3
    assert contributors(network) == ["ab"] * 8
    assert all(process.trained == list(range(8)) for process in network.processes)


def test_a_broker_that_stops_sends_its_workers_away() -> None:
    network = Network(config_of(2, rounds=50), {"a": STEADY, "b": STEADY})
    network.after(5.0, lambda: network.handle(broker.Stop("interrupted (SIGTERM)")))
    network.run()
    for process in network.processes:
        assert process.gone == worker.Gone(End.LOST, "the broker stopped: interrupted (SIGTERM)")
    assert network.over == broker.Over(False, "interrupted (SIGTERM)")


def test_a_broker_that_never_answers_is_given_up_after_the_patience() -> None:
    faults = Faults(loss=1.0)
    network = Network(config_of(1), {"a": STEADY}, faults).run()
    assert network.process("a").gone == worker.Gone(End.LOST, "nothing heard from the broker for 120 s")
    assert network.now == 120.0


def test_an_old_greeting_that_turns_up_late_does_not_end_anything() -> None:
    network = Network(config_of(2, rounds=8), {"a": STEADY, "b": STEADY})
    network.run(until_s=4.2)
    process = network.process("a")
    hello = next(message for _, name, _, message in network.sent if name == "a" and isinstance(message, Hello))
    network.handle(broker.Received(process.peer, Envelope("", 0, hello)))
    ended(network)
    assert contributors(network) == ["ab"] * 8
    assert len([message for message in network.starts["a"] if message.next > 0]) >= 1, "it has started anew"


def test_a_message_of_an_earlier_broker_changes_nothing() -> None:
    network = Network(config_of(2, rounds=6), {"a": STEADY, "b": STEADY})
    network.run(until_s=4.2)
    for process in network.processes:
        stale = worker.Received(Envelope(RUN, 0, Commit(5, 1, 1, 1, 2000, 1, False)))
        told = process.participant.told
        process.handle(stale)
        assert process.participant.told == told
    ended(network)


# Histories


@cache
def seen(seed: int, mode: str = "") -> Counter[str]:
    """What happened in a history, which ended well; once for all the tests that ask."""
    try:
        return outcome(history(seed, mode))
    except Exception as error:
        raise AssertionError(f"{replay(seed, mode)}: {error}") from error


@pytest.mark.parametrize("part", range(8))
def test_every_history_ends_with_every_round_committed_and_every_client_drained(part: int) -> None:
    for seed in range(part * 15, part * 15 + 15):
        seen(seed)


def test_rounds_that_are_trained_at_once_end_as_well() -> None:
    """Also where a client begins, or begins again, in the middle of such a pair."""
    all_seen = sum((seen(seed, "lisa") for seed in range(500, 530)), Counter[str]())
    expected = ("lost", "rejoining", "dead", "late", "skipped", "behind a start", "restarted", "resumed")
    assert {what for what in expected if not all_seen[what]} == set()


@given(rng=st.randoms(use_true_random=False), seed=st.integers(0, 3))
@hypothesis_settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_drawn_ends_well(rng: random.Random, seed: int) -> None:
    """Hypothesis draws, so that what fails shrinks to few clients, rounds and incidents."""
    outcome(drawn(rng, seed))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_large_histories_end_well() -> None:
    """On all cores. Which one failed, and the line that replays it, is in the message."""
    failed = [f"{replay(seed, large=True)}\n{trouble}" for seed, trouble in failures(range(10_000), large=True)]
    assert not failed, f"{len(failed)} of 10,000 histories failed, among them\n" + "\n".join(failed[:3])


def test_the_histories_are_as_bad_as_they_say() -> None:
    """The machinery has teeth: what it is there for does happen in the histories that are run."""
    all_seen = sum((seen(seed) for seed in range(120)), Counter[str]())
    expected = {"lost", "rejoining", "rejected", "abstained", "Rejoin", "Rejected", "Abstain", "dead", "late", "empty"}
    expected |= {"dismissed", "skipped", "behind a start", "folded anew", "in full", "sits out", "makes up for others"}
    expected |= {"folded late", "settled", "quorum", "Waiting", "Late"}
    expected |= {"restarted", "resumed", "resumed with contributions", "tried the disk again", *POINTS}
    assert {what for what in expected if not all_seen[what]} == set()
    assert all_seen[Start.__name__] > 60
