from __future__ import annotations

from typing import Any

import pytest

from parablock.metrics import hidden_share


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([], None),
        ([{"comm_s": None, "exposed_s": None}], None),
        ([{"comm_s": 0.0, "exposed_s": 0.0}], None),
        ([{"comm_s": 2.0, "exposed_s": None}], None),
        ([{"comm_s": 2.0, "exposed_s": 0.0}], 1.0),
        ([{"comm_s": 2.0, "exposed_s": 2.0}], 0.0),
        ([{"comm_s": 2.0, "exposed_s": 3.0}], 0.0),
        # 1.5 of 6 seconds, however they fall on the rounds; the third round tells only half.
        (
            [{"comm_s": 2.0, "exposed_s": 1.5}, {"comm_s": 4.0, "exposed_s": 0.0}, {"comm_s": 9.0, "exposed_s": None}],
            0.75,
        ),
    ],
)
def test_the_hidden_share_is_over_all_rounds_that_tell(rounds: list[dict[str, Any]], expected: float | None) -> None:
    assert hidden_share(rounds) == expected
