"""The ledger: who has given to how many rounds, and what that has cost."""

from __future__ import annotations

from parablock.accountant import epsilon
from parablock.ledger import Ledger
from parablock.privacy_settings import Privacy
from parablock.saved import EVERYBODY


def test_epsilon_is_that_of_the_client_that_gave_to_most_rounds() -> None:
    ledger = Ledger(Privacy("central", clip=1.0, noise=2.0, budget=8.0))
    assert ledger.epsilon == 0.0
    for round, clients in enumerate((("a", "b"), ("b",), (), ("b", "c"))):
        ledger.take(round, clients)
    assert ledger.most == 3
    assert ledger.epsilon == epsilon(2.0, 3, 1e-5)


def test_where_nobody_is_protected_there_is_none() -> None:
    ledger = Ledger(Privacy())
    ledger.take(0, ("a",))
    assert ledger.epsilon is None


def test_a_round_that_nothing_tells_of_any_more_is_charged_to_everybody() -> None:
    ledger = Ledger(Privacy("central", clip=1.0, noise=2.0, budget=8.0))
    ledger.take(2, ())
    assert ledger.most == 2
    ledger.take(3, ("a",))
    ledger.take(5, ("b",))
    assert ledger.most == 4


def test_a_round_of_which_its_entry_tells_nothing_is_charged_to_everybody_too() -> None:
    ledger = Ledger(Privacy("local", clip=1.0, noise=2.0, budget=8.0))
    ledger.take(0, ("a",))
    ledger.take(1, (EVERYBODY,))
    ledger.take(2, ("b",))
    assert (ledger.most, dict(ledger.rounds), ledger.untold) == (2, {"a": 1, "b": 1}, 1)
