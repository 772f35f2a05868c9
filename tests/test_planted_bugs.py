"""The simulation finds what it is there for: bugs that are planted break its invariants. See `tests.planted`."""

from __future__ import annotations

import pytest

from tests.planted import BUGS, SEARCHED, broken, search, searches


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught_by_a_history_that_ends_well_without_it(bug: str) -> None:
    """By the one that is on record. If histories are drawn otherwise by now, `python -m tests.planted` says another."""
    seed = BUGS[bug].seed
    caught = search(bug, [seed])
    assert caught.seed == seed, f"{caught}; find another seed by: python -m tests.planted {bug}"
    assert broken(seed) == ""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_planted_bug_is_found_by_the_first_histories() -> None:
    """Whatever is on record. That these histories end well without a bug is shown in `tests.test_protocol`."""
    found = list(searches(BUGS, range(SEARCHED)))
    print(*found, sep="\n")
    assert {caught.bug for caught in found if caught.seed < 0} == set()
    assert len(found) == len(BUGS) >= 8
