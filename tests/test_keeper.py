"""The keeper: in order, on its own thread, and what it does where the disk refuses."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from parablock import tensor_file
from parablock.tensor_file import Tensors
from parablock.transfer import Encoded
from tests.test_state_folder import WHO, contribution, files, left, vector
from workers.keeper import Keeper
from workers.outbox import Encoding
from workers.spill import Spillable, StoredVector
from workers.state_folder import DELTA, START, LandedBlock, StateFolder

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from parablock.tensor_file import Reader

    Vector = npt.NDArray[np.float32]


class Delta:
    numel = 100

    def __init__(self, values: Vector) -> None:
        self._values = values

    def wait(self) -> Vector:
        return self._values


class Kept:
    """A keeper of a new folder. failures: what went wrong on its thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failures: list[BaseException] = []
        folder = StateFolder(path)
        assert folder.begin(WHO) is None
        self.keeper = Keeper(folder, None, lambda act: act(), self.failures.append)

    def trained(self, round: int, block: int, encoded: Future[Encoding] | None = None) -> None:
        self.keeper.contributed(contribution(round, block), Delta(vector(round)), encoded)
        self.keeper.moved_on(round + 1, 0, 2, astray=False)

    def fence(self) -> None:
        """Wait until all that was told is written."""
        done = threading.Event()
        self.keeper._conveyor.put(done.set)
        assert done.wait(10)


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "state")


def landed(block: int, round: int) -> LandedBlock:
    return LandedBlock(block, round, None, False, round + 2, 0.0)


def test_a_contribution_is_kept_until_its_block_has_landed(kept: Kept) -> None:
    kept.trained(0, 0)
    kept.trained(1, 1)
    kept.keeper.landed(landed(0, 0), vector(9))
    kept.keeper.close()
    assert files(kept.path) == {"blocks/0000.safetensors", "contributions/000001.safetensors", "position.safetensors"}
    assert kept.keeper.written > 3 * vector(0).nbytes
    assert sorted(left(kept.path).contributions) == [1]
    assert not kept.failures


def test_what_a_round_leaves_behind_is_read_from_where_it_is_kept(kept: Kept) -> None:
    """What the block was before only once: where its file has landed it is not written again."""
    starts = [Spillable(Delta(vector(20))), Spillable(Delta(vector(21))), Spillable(Delta(vector(22)))]
    files: list[Reader] = []
    kept.keeper.landed(landed(1, -1), vector(21))
    kept.keeper.landed(landed(2, -1), vector(7))  # another content
    for block, start in enumerate(starts):
        kept.keeper.contributed(contribution(block, block), Delta(vector(block)), None, start, files.append)
    kept.fence()
    assert [START in reader.names for reader in files] == [True, False, True]
    assert all(start._made is None for start in starts)
    kept.keeper.landed(landed(1, 1), vector(9))  # in place of what is being read
    kept.keeper.close()
    assert [start.wait().tobytes() for start in starts] == [vector(20 + n).tobytes() for n in range(3)]
    assert [StoredVector(reader, DELTA)[:].tobytes() for reader in files] == [vector(n).tobytes() for n in range(3)]
    assert not kept.failures


def test_where_the_disk_refuses_it_stays_in_memory(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "write", full)
    start, told = Spillable(Delta(vector(20))), []
    kept.keeper.contributed(contribution(0, 0), Delta(vector(0)), None, start, told.append)
    kept.fence()
    assert (told, start._made is not None, kept.failures) == ([], True, [])
    kept.keeper.close()
    assert start.wait().tobytes() == vector(20).tobytes()


def test_what_nothing_is_heard_of_goes(kept: Kept) -> None:
    for round in range(4):
        kept.trained(round, round)
    kept.keeper.closed(3, {1})
    kept.keeper.dropped(3)
    kept.keeper.close()
    assert sorted(left(kept.path).contributions) == [1]


def test_what_a_lossy_codec_makes_is_kept_with_its_residual(kept: Kept) -> None:
    encoded: Future[Encoding] = Future()
    kept.trained(0, 3, encoded)
    encoded.set_result(Encoding([Encoded(memoryview(b"ab")), Encoded(memoryview(b"c"))], vector(5)))
    kept.keeper.close()
    state = left(kept.path)
    assert [chunk.tobytes() for chunk in state.contributions[0].chunks] == [b"ab", b"c"]
    assert state.residuals[3].tobytes() == vector(5).tobytes()


def test_a_contribution_that_cannot_be_made_stops_it_all(kept: Kept) -> None:
    encoded: Future[Encoding] = Future()
    kept.trained(0, 0)
    kept.trained(1, 1, encoded)
    kept.trained(2, 2)
    encoded.set_exception(RuntimeError("the device is gone"))
    kept.keeper.close()
    state = left(kept.path)
    assert state.position is not None
    assert (state.position.round, sorted(state.contributions)) == (1, [0])


def test_training_waits_only_where_it_would_change_what_is_being_written(kept: Kept) -> None:
    may_write = threading.Event()

    def learnt() -> Tensors:
        assert may_write.wait(10)
        return Tensors({"0.exp_avg": vector(1)}, {"masters": 1, "state": []})

    kept.keeper.learnt(2, 0, learnt)
    kept.keeper.settle([0, 1, 3])  # others do not wait
    waits = threading.Thread(target=kept.keeper.settle, args=([2],))
    waits.start()
    waits.join(0.05)
    assert waits.is_alive()
    may_write.set()
    waits.join(10)
    assert not waits.is_alive()
    kept.keeper.close()


def test_a_full_disk_is_said_once_and_written_again_when_there_is_room(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept.keeper.learnt(0, 0, lambda: Tensors({}, {"masters": 0, "state": []}))
    kept.trained(0, 0)
    kept.trained(1, 1)
    full, released = threading.Event(), []
    write = tensor_file.write

    def writing(path: Path, vectors: Any, *arguments: Any, **named: Any) -> int:
        if full.is_set() and vectors:  # what is small has room still
            raise OSError(28, "No space left on device")
        return write(path, vectors, *arguments, **named)

    monkeypatch.setattr(tensor_file, "write", writing)
    done = threading.Event()
    kept.keeper.landed(landed(3, -1), vector(3), done.set)
    assert done.wait(10)
    full.set()
    kept.keeper.landed(landed(0, 0), vector(0), lambda: released.append(0))
    kept.keeper.learnt(0, 2, lambda: Tensors({"0.exp_avg": vector(1)}, {"masters": 1, "state": []}))
    kept.trained(2, 2)
    done.clear()
    kept.keeper.landed(landed(1, 1), vector(1), done.set)
    assert done.wait(10)
    assert released == [0]
    assert caplog.text.count("No space left") == 1
    assert "written again" not in caplog.text.replace("it is written again", "")
    full.clear()
    kept.trained(3, 3)
    kept.trained(4, 0)
    kept.keeper.close()
    assert caplog.text.count("cannot write") == 1
    assert caplog.text.count("again") == 2
    assert not kept.failures
    state = left(kept.path)
    assert state.position is not None
    assert state.position.round == 5
    assert sorted(state.contributions) == [0, 1, 3, 4], "0 and 1 have not landed, as far as the disk knows"
    assert not state.optimizer, "an older one would be wrong"


def test_a_disk_that_is_slower_than_the_rounds_holds_nobody_up(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("workers.keeper._SMALL_BYTES", 0)
    slow = threading.Event()

    def learnt() -> Tensors:
        assert slow.wait(10)
        return Tensors({"0.exp_avg": vector(1)}, {"masters": 1, "state": []})

    kept.keeper.learnt(0, 0, learnt)
    for round in range(8):
        kept.trained(round, round % 4)
    kept.keeper.learnt(0, 8, learnt)
    slow.set()
    kept.fence()
    kept.trained(8, 0)
    kept.keeper.close()
    assert caplog.text.count("the disk is slower than the rounds") == 1
    state = left(kept.path)
    assert state.position is not None
    assert state.position.round == 9
    assert sorted(state.contributions) == [0, 8]
    assert not state.optimizer, "what is on disk of it does not hold any more"


@pytest.mark.parametrize("lossy", [False, True])
def test_what_waits_for_a_slow_disk_is_what_landed_before_one_round_and_what_one_has_made(
    lossy: bool, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.keeper._SMALL_BYTES", 0)
    slow = threading.Event()

    def learnt() -> None:
        assert slow.wait(10)

    kept.keeper.learnt(0, 0, learnt)
    vectors: list[weakref.ref[Vector]] = []
    released: list[int] = []

    def release(round: int, _held: Vector) -> None:
        released.append(round)

    def a_round(round: int) -> None:
        """Of vectors that only the keeper holds on to."""
        values, delta, residual = vector(round), vector(round), vector(round)
        vectors.extend(map(weakref.ref, (values, delta, residual)))

        kept.keeper.landed(landed(round % 4, round - 2), values, partial(release, round, values))
        encoded: Future[Encoding] = Future()
        encoded.set_result(Encoding([], residual))
        kept.keeper.contributed(contribution(round, round % 4), Delta(delta), encoded if lossy else None)
        kept.keeper.moved_on(round + 1, 0, 2, astray=False)

    for round in range(6):
        a_round(round)
    gc.collect()
    assert [place for place, held in enumerate(vectors) if held() is not None] == [0, 1, 2][: 3 if lossy else 2]
    assert released == [1, 2, 3, 4, 5]
    slow.set()
    kept.fence()
    assert released == [1, 2, 3, 4, 5, 0]
    a_round(6)
    kept.keeper.close()
    assert sorted(left(kept.path).contributions) == [0, 6]


def test_a_burst_that_is_small_or_of_one_round_is_kept(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = threading.Event()

    def learnt() -> None:
        assert slow.wait(10)

    kept.keeper.learnt(0, 0, learnt)
    for round in range(4):
        kept.trained(round, round)
    monkeypatch.setattr("workers.keeper._SMALL_BYTES", 0)
    for block in range(4, 8):  # as they come to one that has just joined
        kept.keeper.landed(landed(block, 0), vector(block))
    slow.set()
    kept.keeper.close()
    state = left(kept.path)
    assert (sorted(state.contributions), sorted(state.blocks)) == ([0, 1, 2, 3], [4, 5, 6, 7])


def test_when_the_run_is_done_nothing_is_left(kept: Kept) -> None:
    kept.trained(0, 0)
    kept.keeper.remove()
    kept.keeper.close()
    assert not kept.path.exists()
