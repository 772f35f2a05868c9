"""The global model: folds against whole vectors, clients that hold the same to the last bit, and disks that refuse."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from broker.blocks import BaseModel, GlobalBlocks
from broker.store import BlockStore
from parablock.aggregation import STATE, Contribution, server_move, weighted_mean
from parablock.block_file import BLOCK, BlockWriter
from parablock.config import Config, from_dict
from parablock.coordinator_events import Fold, Folded, Store, Unfit
from parablock.journal_rows import Row
from parablock.layout import Layout
from parablock.manifest import Block, Manifest, Slot
from parablock.run_folder import RunFolder
from parablock.saved import Entry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

NUMEL = 2 * 16384 + 77  # two whole chunks of 64 KiB and a rest
MANIFEST = Manifest(
    tuple(Block(index, f"layer {index}", (Slot(f"p{index}", (NUMEL,), "float32", 0),)) for index in range(2)), ()
)


def vector(seed: int, scale: float = 1.0) -> Vector:
    values: Vector = (scale * np.random.default_rng(seed).standard_normal(NUMEL)).astype(np.float32)
    return values


def store_of(round: int, attempt: int) -> Store:
    entry = Entry(round, round % 2, attempt, -1, (), (), (), (), 0.0, 0, 0, 0, "", {}, (), ())
    return Store(round, round % 2, attempt, entry)


class Rows(list[Row]):
    """A journal on no disk."""


class Desk:
    """A broker's blocks in a folder of a run, with what it said of them."""

    def __init__(self, path: Path, **tables: Any) -> None:
        self.config: Config = from_dict({"network": {"chunk_bytes": 65536}, **tables})
        self.folder = RunFolder.create(path / "run", self.config)
        self.base = [vector(index) for index in range(2)]
        self.blocks = GlobalBlocks(BaseModel(MANIFEST, "", "", list(self.base)), self.config)
        self.disk = BlockStore(self.folder.blocks, Rows(), "run", MANIFEST.digest, keep=2)  # type: ignore[arg-type]

    def fold(
        self,
        round: int,
        attempt: int,
        deltas: Mapping[str, Vector],
        first: int = 0,
        upto: int = 3,
        steps: Mapping[str, int] | None = None,
    ) -> list[Folded | Unfit]:
        """Clients weigh 1, 2, …; answers to the folds of chunks `first` to `upto`. steps: of each client; else 4."""
        layout = Layout.up(self.config, NUMEL)
        answers: list[Folded | Unfit] = []
        for index in range(first, upto):
            contributions = tuple(
                Contribution(
                    client, weight, (steps or {}).get(client, 4), layout.codec.encode(delta[layout.part(index)])
                )
                for weight, (client, delta) in enumerate(deltas.items(), start=1)
            )
            made = self.blocks.fold(Fold(round, round % 2, attempt, index, contributions, self.config.robust.bad))
            if isinstance(made, Unfit):
                answers.append(made)
                continue
            answers.append(made.answer)
            self.disk.write(round, attempt, made.block, made.numel, made.parts)
        return answers

    def store(self, round: int, attempt: int) -> Vector:
        store = store_of(round, attempt)
        tensors = self.blocks.tensors(store)
        self.disk.commit(store, tensors)
        self.blocks.settle(store)
        return tensors[BLOCK]

    def said(self, answers: list[Folded | Unfit], attempt: int) -> Vector:
        """What a client decodes."""
        layout = Layout.down(self.config, NUMEL, attempt)
        parts = []
        for index, answer in enumerate(answers):
            assert isinstance(answer, Folded)
            part = layout.part(index)
            parts.append(layout.codec.decode(answer.chunk.payload, part.stop - part.start))
        return np.concatenate(parts)


@pytest.mark.parametrize("optimizer", STATE)
def test_folding_by_chunks_is_folding_whole_vectors(tmp_path: Path, optimizer: str) -> None:
    desk = Desk(tmp_path, server={"optimizer": optimizer, "lr": 0.7, "momentum": 0.8})
    x, state = list(desk.base), dict[int, Any]()
    for round in range(6):
        deltas = {"a": vector(10 + round, 0.1), "b": vector(20 + round, 0.1), "c": vector(30 + round, 0.1)}
        block = round % 2
        mean = weighted_mean(list(deltas.values()), [1, 2, 3])
        move, state[block] = server_move(desk.config.server, mean, state.get(block, {}))
        x[block] = x[block] + move
        answers = desk.fold(round, 1, deltas)
        assert desk.store(round, 1).tobytes() == x[block].tobytes()
        assert desk.said(answers, 1).tobytes() == x[block].tobytes()
        version, values = desk.folder.load_blocks()[block]
        assert (version, values.tobytes()) == (round + 1, x[block].tobytes())


@pytest.mark.parametrize("weights", ["normalised", "tokens"])
def test_steps_count_as_the_settings_say(tmp_path: Path, weights: str) -> None:
    desk = Desk(tmp_path, round={"weights": weights})
    deltas = {"a": vector(1), "b": vector(2)}
    desk.fold(0, 1, deltas, steps={"a": 2, "b": 8})
    mean = weighted_mean(list(deltas.values()), [1, 2], [2, 8] if weights == "normalised" else None)
    assert desk.store(0, 1).tobytes() == (desk.base[0] + mean).tobytes()


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_by_element_clients_count_alike_and_what_is_not_finite_is_refused(tmp_path: Path, rule: str) -> None:
    """An infinity would be trimmed away, and its client pass for an honest one."""
    desk = Desk(tmp_path, robust={"rule": rule, "bad": 1}, round={"clients": 3})
    deltas = {"a": vector(1), "b": vector(2), "c": vector(3)}
    spoilt = deltas | {"b": deltas["b"].copy()}
    spoilt["b"][5] = np.inf
    (answer,) = desk.fold(0, 1, spoilt, upto=1)
    assert isinstance(answer, Unfit)
    assert set(answer.reasons) == {"b"}
    desk.fold(0, 2, deltas, steps={"a": 1})
    middle = np.median(list(deltas.values()), axis=0)
    assert desk.store(0, 2).tobytes() == (desk.base[0] + middle).tobytes()


def moves(answers: list[Folded | Unfit]) -> list[float]:
    return [answer.moved for answer in answers if isinstance(answer, Folded)]


@pytest.mark.parametrize("down", ["float32", "int8"])
@pytest.mark.parametrize("optimizer", ["average", "yogi"])
def test_how_far_a_round_moved_its_block_is_told_where_the_order_needs_it(
    tmp_path: Path, down: str, optimizer: str
) -> None:
    settings = {"codec": {"down": down}, "server": {"optimizer": optimizer}}
    desk = Desk(tmp_path, schedule={"order": "importance"}, **settings)
    desk.fold(0, 1, {"a": vector(7)}, upto=2)  # given up, and forgotten
    *before, last = moves(desk.fold(0, 2, {"a": vector(8), "b": vector(9)}))
    assert before == [0.0, 0.0]
    apart = desk.store(0, 2).astype(np.float64) - desk.base[0]
    assert last == pytest.approx(float(np.sqrt(np.mean(apart**2))), rel=1e-5)
    (tmp_path / "other").mkdir()
    other = Desk(tmp_path / "other", **settings)
    assert moves(other.fold(0, 1, {"a": vector(8)})) == [0.0] * 3
    other.store(0, 1)


@pytest.mark.parametrize("feedback", [True, False], ids=["feedback", "no feedback"])
@pytest.mark.parametrize("down", ["bfloat16", "float16", "int8", "int4"])
def test_clients_that_add_the_changes_hold_x_bit_for_bit(tmp_path: Path, down: str, feedback: bool) -> None:
    desk = Desk(tmp_path, codec={"up": "int8", "down": down, "error_feedback": feedback})
    client, exact = list(desk.base), list(desk.base)
    for round in range(20):
        block, delta = round % 2, vector(round, 0.01)
        client[block] = client[block] + desk.said(desk.fold(round, 1, {"a": delta}), 1)
        assert desk.store(round, 1).tobytes() == client[block].tobytes()
        layout = Layout.up(desk.config, NUMEL)
        coded = [layout.codec.encode(delta[layout.part(n)]) for n in range(3)]
        exact[block] = exact[block] + np.concatenate(
            [layout.codec.decode(c, layout.part(n).stop - layout.part(n).start) for n, c in enumerate(coded)]
        )
    if feedback:  # what is missing is what one change has lost, and not ten
        step = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "int8": 0.5 / 127, "int4": 0.5 / 7}[down]
        assert all(abs(c - e).max() < 0.06 * 2.5 * step + 1e-5 for c, e in zip(client, exact, strict=True))


@pytest.mark.parametrize("optimizer", STATE)
def test_a_second_attempt_takes_the_place_of_the_first(tmp_path: Path, optimizer: str) -> None:
    settings = {"codec": {"down": "int4"}, "server": {"optimizer": optimizer}}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    desk, plain = Desk(tmp_path / "one", **settings), Desk(tmp_path / "two", **settings)
    for round in (0, 2):
        good = {"a": vector(5 + round)}
        desk.fold(round, 1, {"a": vector(5 + round), "b": vector(6)}, upto=2)
        said = desk.said(desk.fold(round, 2, good), 2)
        assert said.tobytes() == plain.said(plain.fold(round, 1, good), 1).tobytes()
        assert desk.store(round, 2).tobytes() == plain.store(round, 1).tobytes()


@pytest.mark.parametrize("up", ["float32", "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_unfit_names_the_client_whose_values_are_not_finite(tmp_path: Path, up: str, bad: float) -> None:
    desk = Desk(tmp_path, codec={"up": up})
    spoilt = vector(1)
    spoilt[16384 + 5] = bad
    fit, unfit, _ = desk.fold(0, 1, {"a": vector(0), "b": spoilt, "c": vector(2)})
    assert isinstance(fit, Folded)
    assert unfit == Unfit(0, 1, {"b": "the update holds values that are not finite (NaN or infinity)"})
    desk.fold(0, 2, {"a": vector(0), "c": vector(2)})
    stored = desk.store(0, 2)
    mean = weighted_mean([vector(0), vector(2)], [1, 2])
    if up == "float32":
        assert stored.tobytes() == (desk.base[0] + mean).tobytes()


def test_where_only_the_mean_overflows_everybody_is_named(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    # Each share of such a value fits, and their sum does not, because shares are rounded.
    large = np.full(NUMEL, np.finfo(np.float32).max, np.float32)
    deltas = {f"c{n}": large for n in range(7)}
    with np.errstate(over="ignore"):
        mean = weighted_mean(list(deltas.values()), list(range(1, 8)))
        assert not np.isfinite(mean).all(), "else this would test nothing"
        (answer,) = desk.fold(0, 1, deltas, upto=1)
    desk.disk.close()
    assert isinstance(answer, Unfit)
    assert set(answer.reasons) == set(deltas)
    assert "so large that a mean of them is not finite" in answer.reasons["c0"]


@pytest.mark.parametrize("down", ["float32", "bfloat16", "int8"])
def test_a_block_that_would_overflow_is_nobodys_alone(tmp_path: Path, down: str) -> None:
    """The mean is finite, ten times it is not."""
    desk = Desk(tmp_path, codec={"down": down}, server={"lr": 10.0})
    (answer,) = desk.fold(0, 1, {"a": np.full(NUMEL, 3e38, np.float32)}, upto=1)
    assert isinstance(answer, Unfit)
    assert "so large" in answer.reasons["a"]
    desk.fold(0, 2, {"a": vector(1)})
    assert np.isfinite(desk.store(0, 2)).all()


@pytest.mark.parametrize("down", ["float32", "int8"])
@pytest.mark.parametrize("optimizer", ["adam", "yogi"])
def test_a_second_moment_that_would_overflow_is_not_kept(tmp_path: Path, optimizer: str, down: str) -> None:
    """It moves nothing, which is finite, and would not move anything in any later round either."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    settings = {"codec": {"down": down}, "server": {"optimizer": optimizer, "lr": 0.01}}
    desk, plain = Desk(tmp_path / "one", **settings), Desk(tmp_path / "two", **settings)
    (answer,) = desk.fold(0, 1, {"a": np.full(NUMEL, 1e25, np.float32)}, upto=1)
    assert isinstance(answer, Unfit)
    assert "so large" in answer.reasons["a"]
    for round in (0, 2):
        desk.fold(round, 2, {"a": vector(round)})
        plain.fold(round, 1, {"a": vector(round)})
        assert desk.store(round, 2).tobytes() == plain.store(round, 1).tobytes()


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(params=["momentum", "yogi"])
def twins(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Desk, Desk]]:
    """Two brokers after the same first round of block 0: one whose disk will refuse, and one whose will not."""
    desks = []
    for name in ("refused", "plain"):
        (tmp_path / name).mkdir()
        desk = Desk(tmp_path / name, codec={"down": "int8"}, server={"optimizer": request.param})
        desk.fold(0, 1, {"a": vector(3)})
        desk.store(0, 1)
        desks.append(desk)
    yield desks[0], desks[1]
    for desk in desks:
        desk.disk.close()


@pytest.mark.parametrize("since", [0, 1, 3], ids=["at the first chunk", "in mid-fold", "at the end"])
@pytest.mark.parametrize("where", ["write", "commit"])
def test_a_disk_that_refuses_changes_nothing_and_may_be_tried_again(
    twins: tuple[Desk, Desk], monkeypatch: pytest.MonkeyPatch, where: str, since: int
) -> None:
    """since: chunks folded before the disk is full."""
    desk, plain = twins
    _, before = desk.folder.load_blocks()[0]
    expected = plain.said(plain.fold(2, 1, {"a": vector(4)}), 1)
    answers = desk.fold(2, 1, {"a": vector(4)}, upto=since)
    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, where, refuse)
        answers += desk.fold(2, 1, {"a": vector(4)}, first=since)
        assert desk.said(answers, 1).tobytes() == expected.tobytes(), "clients get it all the same"
        if (where, since) != ("write", 3):  # there everything is written
            for _ in range(2):
                with pytest.raises(OSError, match="No space left"):
                    desk.store(2, 1)
    version, values = desk.folder.load_blocks()[0]
    assert (version, values.tobytes()) == (1, before.tobytes())
    assert desk.store(2, 1).tobytes() == plain.store(2, 1).tobytes()
    assert desk.folder.load_blocks()[0][0] == 3
    assert desk.folder.blocks.listed() == {0: [1, 3]}
    assert not desk.folder.blocks.partial()
    for one in twins:  # the optimizer's state and the residual have moved on once
        one.fold(4, 1, {"a": vector(9)})
    assert desk.store(4, 1).tobytes() == plain.store(4, 1).tobytes()


def test_a_folder_that_cannot_be_written_to_is_told_when_it_counts(
    twins: tuple[Desk, Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, _ = twins
    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "__init__", refuse)
        desk.fold(2, 1, {"a": vector(4)})
        with pytest.raises(OSError, match="No space left"):
            desk.store(2, 1)
    desk.store(2, 1)
    assert desk.folder.load_blocks()[0][0] == 3


def test_closing_leaves_no_half_written_block(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.fold(0, 1, {"a": vector(1)}, upto=2)
    desk.disk.close()
    assert not list((desk.folder.path / "blocks").iterdir())


def test_storing_what_was_not_folded_is_our_own_bug(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.fold(0, 2, {"a": vector(1)})
    with pytest.raises(AssertionError, match="another attempt was folded last"):
        desk.store(0, 1)
    desk.disk.close()
