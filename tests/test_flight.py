"""Rounds on the way: what stands in the model after each landing, whatever the order and however few the blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parablock.correction import Corrector
from parablock.flight import Flight, Landing
from parablock.sections import Pipeline

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]


BLOCKS = 6  # of one tensor each


def flight(correction: Any = "own", clients: int = 4) -> Flight:
    return Flight(Corrector(Pipeline(correction=correction), clients, [[0]] * BLOCKS))


def v(*values: float) -> Vector:
    return np.array(values, dtype=np.float32)


def unasked() -> Vector:
    raise AssertionError("the block's content is only asked for where a later round has trained it")


def depart(flight: Flight, round: int, block: int, start: Vector, delta: Vector) -> Vector:
    """What stands for the block from then on."""
    (alpha,) = flight.depart(round, block, start, delta)
    return start + np.float32(alpha) * delta


def land(flight: Flight, round: int, block: int, landed: Vector | None, held: Vector | None = None) -> Landing:
    return flight.land(round, block, landed, alone=False, held=unasked if held is None else lambda: held)


def test_what_stands_for_a_block_is_its_guess() -> None:
    assert depart(flight("own"), 0, 0, v(1, 2), v(4, 8)).tolist() == [5, 10]
    assert depart(flight("shrink"), 0, 0, v(1, 2), v(4, 8)).tolist() == [3, 6]
    assert depart(flight("stale"), 0, 0, v(1, 2), v(4, 8)).tolist() == [1, 2]


@pytest.mark.parametrize("correction", ["own", "shrink", "stale"])
def test_what_landed_replaces_the_guess_exactly(correction: str) -> None:
    one = flight(correction)
    depart(one, 0, 0, v(0.1, 0.2), v(0.3, 0.4))
    depart(one, 1, 1, v(0, 0), v(1, 1))  # of another block: of no influence
    landed = v(1 / 3, 1e-30)
    landing = land(one, 0, 0, landed)
    assert landing.value is not None
    assert landing.value.tobytes() == landed.tobytes()


def test_a_landing_tells_its_alpha_drift_and_miss() -> None:
    one = flight("shrink")
    depart(one, 0, 0, v(0, 0), v(2, 0))
    landing = land(one, 0, 0, v(1, 0))
    assert (landing.alpha, landing.drift, landing.miss) == (0.5, 1.0, 0.0)
    depart(one, 4, 0, v(1, 0), v(4, 0))
    landing = land(one, 4, 0, v(5, 0))
    assert (landing.alpha, landing.drift, landing.miss) == (0.5, 0.0, 0.5)
    assert depart(one, 8, 0, v(0, 0), v(4, 0)).tolist() == [3, 0]  # 0.5 seen, then 1: 0.75 with smoothing 0.5


def test_a_round_that_changed_nothing_takes_the_guess_back() -> None:
    one = flight("shrink")
    depart(one, 0, 0, v(1, 2), v(4, 8))
    landing = land(one, 0, 0, None)
    assert landing.value is not None
    assert landing.value.tolist() == [1, 2]
    assert (landing.alpha, landing.drift, landing.miss) == (0.5, 0.0, 0.0)
    assert depart(one, 4, 0, v(0, 0), v(4, 8)).tolist() == [2, 4]  # nothing was learnt from it


def test_a_round_without_us_lands_as_it_is() -> None:
    one = flight()
    landing = land(one, 0, 0, v(3, 4))
    assert landing.value is not None
    assert (landing.value.tolist(), landing.alpha, landing.drift, landing.miss) == ([3, 4], 0.0, 0.0, 0.0)


def test_a_single_client_is_single_until_another_one_has_contributed_even_to_a_round_without_us() -> None:
    """With two clients of whom one is drawn a round, every commit has one contributor."""
    one = flight("shrink", clients=1)
    depart(one, 0, 0, v(0), v(4))
    assert one.land(0, 0, v(1), alone=True, held=unasked).alpha == 1.0
    assert depart(one, 1, 0, v(1), v(4)) == v(5), "what the mean was is not learnt from"
    one.land(2, 1, v(7), alone=False, held=unasked)
    assert depart(one, 3, 0, v(1), v(4)) == v(2), "from now on it is, a quarter"


def test_a_round_without_us_that_changed_nothing_changes_nothing() -> None:
    assert land(flight(), 0, 0, None) == Landing(None, 0.0, 0.0, 0.0)


def test_a_guess_of_a_round_that_was_closed_without_us_is_given_up() -> None:
    one = flight()
    depart(one, 0, 0, v(0), v(4))
    assert land(one, 2, 0, v(7)).value == v(7)
    assert one.revert(range(100)) == {}


def test_a_round_that_was_overtaken_does_not_undo_the_later_one() -> None:
    one = flight()
    depart(one, 0, 0, v(0), v(4))
    depart(one, 1, 0, v(4), v(2))
    assert land(one, 1, 0, v(9)).value == v(9)
    assert land(one, 0, 0, v(5)) == Landing(None, 0.0, 0.0, 0.0)
    assert land(one, 0, 0, None) == Landing(None, 0.0, 0.0, 0.0)
    assert land(one, 0, 1, v(5)).value == v(5)  # of another block


def test_the_delta_rule_where_every_round_trains_the_same_block() -> None:
    # B = 1, two rounds in flight; every number was worked out by hand.
    one = flight("own")
    assert depart(one, 0, 0, v(0), v(4)) == v(4)
    assert depart(one, 1, 0, v(4), v(2)) == v(6)
    assert depart(one, 2, 0, v(6), v(1)) == v(7)
    # Round 0 moved the block to 1 and not to 4: everything after it stands 3 lower.
    assert land(one, 0, 0, v(1), held=v(7)).value == v(4)
    assert depart(one, 3, 0, v(4), v(8)) == v(12)
    # Round 1 moved it from 1 to 5, where 1 + 2 was guessed: 2 higher.
    assert land(one, 1, 0, v(5), held=v(12)).value == v(14)
    # Round 2 changed nothing: its 1 goes.
    assert land(one, 2, 0, None, held=v(14)).value == v(13)
    # Round 3 is the last one: what landed replaces everything.
    assert land(one, 3, 0, v(20)).value == v(20)


def test_the_delta_rule_is_only_used_where_it_must_be() -> None:
    one = flight("own")
    depart(one, 0, 0, v(0.1), v(0.2))
    depart(one, 1, 1, v(0.1), v(0.2))
    depart(one, 2, 0, v(0.3), v(0.2))
    assert land(one, 1, 1, v(0.7)).value == v(0.7)  # does not ask what the block holds
    assert land(one, 0, 0, v(0.7), held=v(0.5)).value is not None


def test_what_all_clients_hold_of_a_guessed_block_is_what_landed_last() -> None:
    one = flight("own")
    assert one.public(0) is None
    depart(one, 0, 0, v(1), v(4))
    depart(one, 1, 0, v(5), v(2))
    assert one.public(0) == v(1), "not what round 1 began with"
    assert one.public(1) is None
    land(one, 0, 0, v(3), held=v(7))
    assert one.public(0) == v(3)
    land(one, 1, 0, None, held=v(5))
    assert one.public(0) is None, "the model holds it"


def test_a_later_round_that_changed_nothing_leaves_the_earlier_guess_to_be_taken_back() -> None:
    one = flight("own")
    depart(one, 0, 0, v(1), v(4))
    depart(one, 1, 0, v(5), v(2))
    assert land(one, 1, 0, None).value == v(5)
    assert one.public(0) == v(1)
    assert one.revert(range(100)) == {0: v(1)}
    assert one.public(0) is None


class Resting:
    """Values that note when they are read."""

    def __init__(self, name: str, values: Vector, read: list[str]) -> None:
        self.size = values.size
        self._name, self._values, self._read = name, values, read

    def __getitem__(self, part: slice) -> Vector:
        self._read.append(self._name)
        return self._values[part]


def test_a_departure_is_read_only_when_it_lands() -> None:
    """It may be on its way from the device, or on disk."""
    one, read = flight("own"), []
    one.depart(0, 0, Resting("start", v(1), read), Resting("delta", v(4), read))
    assert land(one, 1, 1, v(0)).value == v(0)
    assert one.public(0) is not None
    assert read == []
    landing = land(one, 0, 0, v(2))
    assert (landing.value, landing.alpha, landing.drift) == (v(2), 1.0, 3.0)
    assert read == ["start", "delta"], "once"


def test_given_up_guesses_leave_the_value_from_before_the_first_of_them() -> None:
    one = flight("own")
    depart(one, 0, 0, v(1), v(4))
    depart(one, 1, 1, v(2), v(4))
    depart(one, 2, 0, v(5), v(4))
    depart(one, 3, 1, v(6), v(4))
    assert one.revert([]) == {}
    assert one.revert(range(3)) == {0: v(1), 1: v(6)}  # of block 1 round 3 remains: 2 + 4
    assert land(one, 3, 1, None).value == v(2)
    assert one.revert(range(100)) == {}


# Any order of things


actions = st.lists(
    st.one_of(
        st.tuples(st.just("depart"), st.integers(-9, 9)),
        st.tuples(st.just("skip"), st.none()),
        st.tuples(st.just("land"), st.tuples(st.integers(0, 5), st.none() | st.integers(-99, 99))),
        st.tuples(st.just("revert"), st.tuples(st.integers(0, 5), st.integers(1, 3))),
    ),
    max_size=40,
)


@settings(max_examples=150)
@given(st.integers(1, 3), st.sampled_from(["own", "stale"]), actions)
def test_a_block_holds_what_was_committed_and_the_guesses_since(
    num_blocks: int, correction: str, script: list[tuple[str, Any]]
) -> None:
    """The model against plain bookkeeping. All values are small whole numbers, so that float32 is exact."""
    one = flight(correction)
    share = {"own": 1, "stale": 0}[correction]
    model = [0] * num_blocks  # what the blocks of the client's model hold
    base, newest = [0] * num_blocks, [-1] * num_blocks  # what was committed last, and by which round
    moves: dict[int, int] = {}  # by round, what its guess added
    round = 0
    for action, argument in script:
        match action:
            case "depart":
                block = round % num_blocks
                value = depart(one, round, block, v(model[block]), v(argument))
                model[block] = int(value[0])
                moves[round] = share * argument
                round += 1
            case "skip":  # a round in which this client took no part
                round += 1
            case "land":
                back, committed = argument
                number = round - 1 - back  # in any order, also twice
                if number < 0:
                    continue
                block = number % num_blocks
                landed = None if committed is None else v(committed)
                landing = one.land(number, block, landed, alone=False, held=lambda block=block: v(model[block]))  # type: ignore[misc]
                if landing.value is not None:
                    model[block] = int(landing.value[0])
                if number >= newest[block]:
                    moves.pop(number, None)
                    if committed is not None:
                        base[block], newest[block] = committed, number
                        moves = {n: move for n, move in moves.items() if n > number or n % num_blocks != block}
            case "revert":
                back, every = argument
                given_up = range(0, max(round - back, 0), every)
                for block, held in one.revert(given_up).items():
                    model[block] = int(held[0])
                moves = {n: move for n, move in moves.items() if n not in given_up}
        for block in range(num_blocks):
            guessed = sum(move for n, move in moves.items() if n % num_blocks == block)
            assert model[block] == base[block] + guessed
            public = one.public(block)
            if any(n % num_blocks == block for n in moves):
                assert public is not None
                assert int(public[0]) == base[block]
            else:
                assert public is None, "the model holds it"
