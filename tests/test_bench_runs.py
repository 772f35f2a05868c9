"""Several runs side by side: how many at a time, in which order they begin and end, and what becomes of the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench import runs
from bench.processes import ChildError
from parablock import config

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SETTINGS = config.from_dict({"round": {"clients": 2, "quorum": 2}})


class Machine:
    """Stands in for the processes: a run takes as many looks as its folder's name says; "fails" never ends well."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.running: set[str] = set()
        self.most = 0

    def launching(self, _settings: config.Config, folder: Path, options: Sequence[str], _env: Any) -> Iterator[None]:
        name = folder.name
        self.log.append(" ".join([name, *options]))
        self.running.add(name)
        self.most = max(self.most, len(self.running))
        try:
            for _ in range(1 if name == "fails" else int(name)):
                yield
            if name == "fails":
                raise ChildError("a worker ended")
            return name
        finally:
            self.running.discard(name)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(runs, "_launching", made.launching)
    monkeypatch.setattr(runs, "POLL_S", 0.0)
    monkeypatch.setattr(runs, "cores", lambda: 16)
    return made


def asked(*names: str) -> list[tuple[config.Config, Path]]:
    return [(SETTINGS, Path(name)) for name in names]


def test_runs_begin_in_order_and_each_is_given_as_it_ends(machine: Machine) -> None:
    ended = list(runs.launch_many(asked("5", "1", "2", "0"), jobs=2))
    assert ended == [(1, "1"), (2, "2"), (0, "5"), (3, "0")]
    assert [line.split()[0] for line in machine.log] == ["5", "1", "2", "0"]
    assert machine.most == 2


@pytest.mark.parametrize(("jobs", "threads"), [(2, 4), (3, 2), (8, 1), (100, 1)])
def test_the_cores_are_shared_out_to_the_workers_of_all_jobs(jobs: int, threads: int, machine: Machine) -> None:
    list(runs.launch_many(asked("1"), jobs))
    assert machine.log == [f"1 --threads {threads}"]


def test_where_one_fails_the_others_are_ended(machine: Machine) -> None:
    with pytest.raises(ChildError, match="a worker ended"):
        list(runs.launch_many(asked("9", "fails", "3"), jobs=2))
    assert machine.running == set()
    assert len(machine.log) == 2


def test_whoever_wants_no_more_ends_the_others(machine: Machine) -> None:
    several = runs.launch_many(asked("1", "9"), jobs=2)
    assert next(several) == (0, "1")
    assert machine.running == {"9"}
    several.close()
    assert machine.running == set()
