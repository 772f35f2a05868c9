"""Learning curves: what is read from a run's metrics, and the time to a loss."""

from __future__ import annotations

from typing import Any

import pytest

from bench import learning_curve
from bench.figures import FiguresError
from bench.learning_curve import LearningCurve, Point


def evaluation(round: int, time_s: float, loss: float | None) -> dict[str, Any]:
    return {"kind": "evaluation", "round": round, "time_s": time_s, "eval_loss": loss}


def trained(round: int, time_s: float, **told: float | None) -> dict[str, Any]:
    return {"kind": "round", "round": round, "time_s": time_s, "bytes_up": 10, "bytes_down": 5, **told}


def test_a_curve_from_rows_in_any_order() -> None:
    rows = [
        evaluation(-1, 7.0, 4.0),
        trained(0, 8.0),
        evaluation(1, 9.4, 3.0),  # of a pipelined run, whose round is committed later
        trained(1, 9.5),
        trained(2, 11.0),
        evaluation(2, 12.0, 2.0),
    ]
    found = learning_curve.read(rows, "a run")
    assert found.points == (Point(0, 4.0, 0.0, 0), Point(2, 3.0, 2.5, 30), Point(3, 2.0, 4.0, 45))
    assert (found.held_out, found.final_loss, found.time_s, found.nbytes) == ({2: 3.0, 3: 2.0}, 2.0, 4.0, 45)


def test_compute_and_exchange_are_means_over_the_rounds_that_tell() -> None:
    rows = [
        evaluation(-1, 7.0, 4.0),
        trained(0, 8.0, compute_s=1.0, comm_s=None),
        trained(1, 9.0, compute_s=2.0, comm_s=0.25),
        evaluation(1, 9.4, 3.0),
    ]
    found = learning_curve.read(rows, "a run")
    assert (found.compute_s, found.comm_s) == (1.5, 0.25)
    assert learning_curve.read([evaluation(-1, 7.0, 4.0), evaluation(0, 8.0, 3.0)], "a run").compute_s is None


@pytest.mark.parametrize("losses", [(), (4.0,), (4.0, None), (None, 3.0)])
def test_a_loss_that_is_missing_is_told(losses: tuple[float | None, ...]) -> None:
    rows = [trained(0, 8.0), *(evaluation(round - 1, 7.0, loss) for round, loss in enumerate(losses))]
    with pytest.raises(FiguresError, match="a run has no held-out loss"):
        learning_curve.read(rows, "a run")


def test_the_time_to_a_loss_is_the_first_on_straight_lines() -> None:
    curve = LearningCurve(tuple(Point(2 * n, loss, 10.0 * n, n) for n, loss in enumerate((4.0, 2.0, 3.0, 1.0))))
    assert curve.time_to(3.0) == 5.0  # not at 20 s, where it came back
    assert curve.time_to(2.0) == 10.0
    assert curve.time_to(1.5) == pytest.approx(27.5)
    assert curve.time_to(1.0) == 30.0
    assert curve.time_to(0.99) is None
    assert curve.time_to(4.0) == curve.time_to(9.0) == 0.0
