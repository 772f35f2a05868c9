"""Secure aggregation in the whole protocol: the two machines joined in memory, with contributions under masks.

That each mean is the plain sum's, to the last bit, and that no contribution is in two different sums, `tests.network`
asserts at every fold.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from parablock import coordinator_events as broker
from parablock import fixed_point
from parablock import participant_events as worker
from parablock.messages import Chunk, Commit, Keys, Offer, Rejected, Shares, Unmask, Unmasked
from parablock.secure_settings import most_tokens
from parablock.wire import Envelope
from tests.network import RUN, Faults, Habits, Incident, Network, config_of

if TYPE_CHECKING:
    from parablock.config import Config

STEADY = Habits(seconds=(1.0, 1.0))


def masked(clients: int = 3, rounds: int = 6, **more: Any) -> Config:
    secure = {"enabled": True, "range": 8.0} | more.pop("secure", {})
    config: Config = config_of(clients, rounds, secure=secure, **more)
    return config


def ended(network: Network) -> Network:
    network.run().check_ended()
    return network


def contributors(network: Network) -> list[str]:
    return ["".join(committed.contributors) for committed in network.committed]


@pytest.mark.parametrize("mode", ["parablock", "fedbcd", "fedavg", "lora", "lisa"])
@pytest.mark.parametrize("clients", [2, 4])
def test_without_mishaps_everybody_counts_in_every_round(mode: str, clients: int) -> None:
    names = "abcd"[:clients]
    network = ended(Network(masked(clients, 8, mode=mode), dict.fromkeys(names, STEADY)))
    assert contributors(network) == [names] * 8
    sent = Counter(type(message) for *_, message in network.sent)
    assert sent[Offer] == sent[Commit] == sent[Keys] == 8 * clients, "nothing is said twice"
    assert sent[Unmask] == sent[Unmasked]
    assert sent[Rejected] == 0
    assert not any(process.dismissed for process in network.processes)


def test_rounds_take_as_long_as_without_masks() -> None:
    """Keys are exchanged while the round trains, over a link of 0.1 s a message."""
    seconds = []
    for secure in (False, True):
        faults = Faults(delay_s=(0.1, 0.1))
        config = masked(3, 10, secure={"enabled": secure})
        seconds.append(ended(Network(config, dict.fromkeys("abc", STEADY), faults)).over_at)
    assert seconds[1] <= seconds[0] + 0.5


def test_slices_go_down_while_later_ones_go_up() -> None:
    faults = Faults(delay_s=(0.1, 0.1))
    config = masked(2, 4, window=1024, schedule={"order": "descending"})
    network = ended(Network(config, {"a": STEADY, "b": STEADY}, faults))
    up, down = (
        [s.at for s in network.sent if s.up is up and isinstance(s.message, Chunk) and s.message.round == 0]
        for up in (True, False)
    )
    assert len(up) == len(down) == 6
    assert min(down) < max(up), "the first slice is on its way before the last one has left"


def test_half_of_the_clients_train_a_round() -> None:
    config = masked(6, 10, fraction=0.5)
    network = ended(Network(config, dict.fromkeys("abcdef", STEADY)))
    assert all(len(names) == 3 for names in contributors(network))
    assert len(set(contributors(network))) > 1


def test_who_cannot_be_masked_abstains_and_says_why() -> None:
    habits = {**dict.fromkeys("abc", STEADY), "d": Habits(seconds=(1.0, 1.0), spoils=frozenset({1, 3}))}
    network = ended(Network(masked(4, 6), habits))
    assert contributors(network) == ["abcd", "abc", "abcd", "abc", "abcd", "abcd"]
    assert network.process("d").dismissed.keys() == {1, 3}
    assert "not finite" in network.process("d").dismissed[1]
    assert sum("not finite" in note.text for note in network.notes if note.kind == "abstained") == 2


def test_a_sum_of_fewer_than_the_threshold_is_not_made() -> None:
    """Two of two are needed: the sum of one would be that one."""
    habits = {"a": STEADY, "b": Habits(seconds=(1.0, 1.0), diverges=frozenset({1, 2}))}
    network = ended(Network(masked(2, 5), habits))
    assert contributors(network) == ["ab", "", "", "ab", "ab"]
    reasons = [entry.reason for entry in network.committed]
    assert "1 contributions are in, and it takes 2 to unmask their sum" in reasons[1]


def test_a_mean_that_is_not_finite_is_nobodys_fault_and_counts_for_nothing() -> None:
    """The server's rate makes it so; the whole numbers themselves are always finite."""
    network = ended(Network(masked(3, 4, server={"lr": 3e38}), dict.fromkeys("abc", STEADY)))
    assert contributors(network) == [""] * 4
    assert all("nothing is counted: the update holds values so large" in entry.reason for entry in network.committed)


@pytest.mark.parametrize("at", [0.45, 0.6, 1.0, 1.52, 1.54, 1.6, 1.7, 2.3, 2.55])
def test_a_client_that_dies_at_any_moment_spoils_nothing(at: float) -> None:
    """Before its keys, after them, before its shares, in the middle of its upload, before it has helped to unmask."""
    faults = Faults(incidents=(Incident("kill", "d", at=at, lasts=5.0),))
    network = ended(Network(masked(4, 12, deadline_s=2.0), dict.fromkeys("abcd", STEADY), faults))
    assert all(set(names) >= set("abc") for names in contributors(network)), contributors(network)
    assert contributors(network)[-1] == "abcd"


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("at", [1.55, 2.2, 2.6, 3.4])
def test_a_client_that_comes_back_gives_no_round_twice(at: float, kept: bool) -> None:
    faults = Faults(incidents=(Incident("kill", "b", at=at, lasts=0.5, kept=kept),))
    network = ended(Network(masked(3, 12), dict.fromkeys("abc", STEADY), faults))
    assert contributors(network)[-1] == "abc"
    assert sum(names == "abc" for names in contributors(network)) >= 7


@pytest.mark.parametrize("at", [1.0, 1.52, 1.54, 1.56, 1.6, 2.0, 2.56, 2.62])
def test_a_broker_that_restarts_has_fresh_keys_and_the_round_anew(at: float) -> None:
    faults = Faults(incidents=(Incident("kill", "broker", at=at, lasts=2.0),))
    network = ended(Network(masked(3, 8), dict.fromkeys("abc", STEADY), faults))
    assert contributors(network) == ["abc"] * 8, "the same clients come back, so that their sum is the same"
    assert not any(process.dismissed for process in network.processes)


@pytest.mark.parametrize("at", [1.60, 1.65, 1.7, 1.75, 1.8, 1.85])
def test_after_a_restart_another_set_of_a_round_that_was_unmasked_is_not_summed(at: float) -> None:
    """One client dies with the broker. From the moment on in which the others have helped to unmask a slice, which is
    after the first of these, they do not give theirs again."""
    faults = Faults(
        incidents=(Incident("kill", "broker", at=at, lasts=1.0), Incident("kill", "d", at=at, lasts=9.0)),
        delay_s=(0.02, 0.02),
    )
    network = ended(Network(masked(4, 10, window=1024), dict.fromkeys("abcd", STEADY), faults))
    found = [reason for process in network.processes for reason in process.dismissed.values()]
    assert ["another sum would tell more" in reason for reason in found] == [True] * (3 if at > 1.6 else 0), found


def test_who_falls_out_before_a_second_broker_names_a_slice_again_spoils_the_round_at_once() -> None:
    """All four exchange keys with the second broker; then one falls out, and the sum of the others would be another
    one than what they have helped the first broker to. That they give it to nobody, `tests.network` asserts."""
    faults = Faults(
        incidents=(Incident("kill", "broker", at=1.7, lasts=1.0), Incident("kill", "d", at=3.76, lasts=9.0)),
        delay_s=(0.02, 0.02),
    )
    config = masked(4, 10, window=1024)
    network = ended(Network(config, dict.fromkeys("abcd", STEADY), faults))
    first = network.committed[0]
    assert not first.contributors
    assert "0 have answered, and a will not: an earlier broker has added it up with others" in first.reason
    refused = [sent.at for sent in network.sent if sent.message == Unmasked(0, 0) and sent.at > 3.76]
    assert len(refused) == 3
    closed = min(s.at for s in network.sent if isinstance(s.message, Commit) and s.message.round == 0)
    assert closed < min(refused) + 0.5, "nobody waits for the answers to time out"


def spoken(network: Network, name: str, message: Any, payload: bytes) -> list[str]:
    """What the broker notes when it hears this."""
    noted = len(network.notes)
    envelope = Envelope(RUN, 1, message, memoryview(payload))
    network.handle(broker.Received(network.process(name).peer, envelope))
    return [note.text for note in network.notes[noted:]]


@pytest.mark.parametrize(
    ("message", "payload", "why"),
    [
        (Keys(0), bytes(7), "keys for round 0 are"),
        (Shares(1), bytes(7), "for which nobody has shown keys"),
        (Unmasked(0, 0), bytes(33), "bytes of shares for slice 0"),
        (Shares(0), bytes(7), "after the roll"),
    ],
)
def test_what_cannot_be_in_a_sum_breaks_the_protocol(message: Any, payload: bytes, why: str) -> None:
    network = Network(masked(2, 6), {"a": STEADY, "b": STEADY}, Faults(delay_s=(0.01, 0.01)))
    network.run(0.62)  # they have shown their keys
    sums = network.coordinator._collection._sums
    assert sums is not None
    del sums._rounds[1]
    assert any(why in text for text in spoken(network, "a", message, payload))
    assert spoken(network, "b", message=Keys(7), payload=bytes(7)) == [], "of a round that nobody is at yet"


def test_in_a_plain_run_nobody_speaks_of_sums() -> None:
    network = Network(config_of(2, 6), {"a": STEADY, "b": STEADY})
    network.run(1.0)
    assert "not masked" in spoken(network, "a", Keys(0), bytes(64))[0]
    process = network.process("b")
    process.handle(worker.Received(Envelope(RUN, 1, Unmask(0, 0, ("a", "b")))))
    assert process.gone is not None
    assert "not masked" in process.gone.reason


def test_a_broker_that_asks_for_two_sums_is_left() -> None:
    network = Network(masked(3, 6), dict.fromkeys("abc", STEADY))
    network.run(1.2)
    process = network.process("b")
    process.handle(worker.Received(Envelope(RUN, 1, Unmask(0, 0, ("a", "b", "c")))))
    assert process.gone is None
    process.handle(worker.Received(Envelope(RUN, 1, Unmask(0, 0, ("a", "b")))))
    assert process.gone is not None
    assert "a second, different sum of slice 0" in process.gone.reason


class Overheard(Network):
    """What the broker gets, and what it keeps."""

    def __init__(self, *arguments: Any) -> None:
        self.received: list[bytes] = []
        super().__init__(*arguments)

    def handle(self, event: broker.Event) -> None:
        if isinstance(event, broker.Received) and event.envelope.payload is not None:
            self.received.append(bytes(event.envelope.payload))
        super().handle(event)

    def overheard(self) -> bytes:
        """Everything, one after the other."""
        kept = [tensor.tobytes() for stored in self.folder.versions.values() for tensor in stored.tensors.values()]
        said = [repr(note) for note in self.notes] + self.folder.entries
        return b"|".join([*self.received, *kept, *(text.encode() for text in said)])


@pytest.mark.parametrize("secure", [True, False])
def test_the_broker_is_told_no_value_of_any_contribution(secure: bool) -> None:
    """Eight values in a row are found nowhere, as floats or as whole numbers; without masks all of them are."""
    faults = Faults(incidents=(Incident("kill", "c", at=2.53, lasts=3.0),))
    config = masked(3, 6, secure={"enabled": secure}, deadline_s=2.0)
    network = Overheard(config, dict.fromkeys("abc", STEADY), faults)
    ended(network)
    told, most, found = network.overheard(), most_tokens(config), 0
    for each in network.made.values():
        for made in each:
            values = np.frombuffer(made.values, np.float32)
            plain = [values]
            for clients in (2, 3):
                bits = fixed_point.exponent(clients, config.secure.range)
                plain.append(fixed_point.encode(values, made.weight / most, bits))
            windows = [row[at : at + 8].tobytes() for row in plain for at in range(0, values.size - 8, 8)]
            found += sum(window in told for window in windows)
    assert (found == 0) is secure


def test_what_is_masked_looks_like_noise() -> None:
    network = Overheard(masked(3, 6), dict.fromkeys("abc", STEADY))
    ended(network)
    words = np.concatenate([np.frombuffer(p, np.uint8) for p in network.received if len(p) == 1024])
    counts = np.bincount(words, minlength=256)
    expected = words.size / 256
    chi_square = float(np.sum((counts - expected) ** 2 / expected))
    assert words.size > 20_000
    assert chi_square < 255 + 6 * (2 * 255) ** 0.5, "six standard deviations above the mean of its distribution"


@pytest.mark.parametrize("seed", range(12))
def test_histories_in_which_much_goes_wrong(seed: int) -> None:
    rng = random.Random(seed)
    incidents = []
    for _ in range(rng.randrange(1, 4)):
        victim = rng.choice(["a", "b", "c", "d", "broker"])
        kind = rng.choice(["freeze", "cut", "kill"] if victim != "broker" else ["freeze", "kill", "disk"])
        lasts = rng.uniform(0.2, 9.0)
        incidents.append(Incident(kind, victim, rng.uniform(0.5, 12.0), lasts, kept=rng.random() < 0.5))
    faults = Faults(
        loss=rng.choice([0.0, 0.02]),
        duplication=0.05,
        echo=0.02,
        delay_s=(0.001, rng.choice([0.02, 0.3])),
        ordered=rng.random() < 0.7,
        incidents=tuple(incidents),
    )
    policy = {"grace": rng.random() < 0.5}
    config = masked(4, 12, deadline_s=rng.choice([0.0, 1.0]), policy=policy, window=rng.choice([1024, 2048, 8192]))
    habits = {name: Habits(seconds=(0.3, 1.5)) for name in "abcd"}
    network = Network(config, habits, faults, seed)
    network.run(2000.0).check_ended()
    assert any(contributors(network))


@pytest.mark.parametrize("seed", [1, 2, 5])
def test_who_is_left_while_others_stand_still_is_no_group_of_its_own(seed: int) -> None:
    """Seven of eight stand still now and then, beyond patience and deadlines: there is no sum of fewer than six."""
    rng = random.Random(seed)
    stands = tuple(Incident("freeze", name, rng.uniform(0.3, 6.0), rng.uniform(1.0, 6.0)) for name in "bcdefgh")
    faults = Faults(delay_s=(0.01, 0.01), incidents=stands)
    network = ended(Network(masked(8, 8, deadline_s=1.0), dict.fromkeys("abcdefgh", STEADY), faults))
    assert {len(names) for names in contributors(network)} <= {0, 6, 7, 8}
