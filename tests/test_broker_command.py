"""`parablock broker`: what it refuses and how it says so; and that a full disk holds it up, and no more."""

from __future__ import annotations

import asyncio
import errno
import shutil
import signal
import sqlite3
import time
from typing import TYPE_CHECKING, Any

import pytest

from broker import __main__ as command
from broker import server
from broker.__main__ import _door, _give_up, _resume, main, parser
from broker.authenticator import Authenticator
from broker.blocks import BaseModel
from broker.opening import resume
from broker.pairs import make_throw_away, new_pair
from broker.server import Broker
from broker.socket import RouterSocket
from parablock.allow_list import allow
from parablock.coordinator_events import Event, Note, Revoked, Store, Stored
from parablock.invite import Invite
from parablock.journal import Journal
from parablock.keys import BROKER, fingerprint
from parablock.run_folder import RunFolder
from tests.test_opening import MANIFEST, begun, damage, killed, vector
from workers import __main__ as worker_command

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

BASE = BaseModel(MANIFEST, "weights", "tokens", [vector(0), vector(1)])


@pytest.fixture(autouse=True)
def _keys(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user has a key for the broker."""
    home = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    new_pair(home / "parablock", BROKER)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Of five rounds, and nobody is at work in it."""
    begun(tmp_path / "run", rounds=5).opened.close()
    return tmp_path / "run"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("broker.__main__.tune", lambda: None)
        patch.setattr("signal.signal", lambda *_: None)
        assert main([*arguments]) == code
    said = capsys.readouterr().err
    assert said.startswith("parablock broker: ")
    return said


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_the_start_may_do_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.__main__.load_base", lambda _config: BASE)
    out = tmp_path / "new"
    for place in (
        "parablock.run_folder.os.fsync", "parablock.run_folder.write_text", "parablock.block_file.BlockWriter.commit",
        "parablock.journal.Journal.create",
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            said = refused(capsys, "--out", str(out), "--set", "network.bind=tcp://127.0.0.1:*", code=75)
        assert f"the disk refuses the run folder {out}: No space left on device" in said
        assert said.endswith("when it no longer does, the run had not begun: give the same command again\n")
        RunFolder.check_free(out)


@pytest.mark.parametrize("launched", [False, True])
def test_what_is_to_go_on_later_says_how(
    run: Path, launched: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if launched:
        (run / "launch.json").touch()
    how = f"go on with it: parablock {'run' if launched else 'broker'} --resume {run}\n"
    with monkeypatch.context() as patch:
        patch.setattr("broker.opening.Opened.begin_epoch", full)
        assert refused(capsys, "--resume", str(run), code=75).endswith(how)
    with pytest.raises(SystemExit) as caught:
        _give_up(run, (), signal.SIGTERM, None)
    assert caught.value.code == 75
    said = capsys.readouterr().err
    assert said == f"parablock broker: interrupted (SIGTERM) before it served anybody; {how}"


@pytest.mark.parametrize("launched", [False, True])
def test_how_to_go_on_names_the_door(
    run: Path, launched: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the next broker has another key, and none of the clients on its list."""
    new_pair(run.parent / "our keys", BROKER)
    if launched:
        (run / "launch.json").touch()
    monkeypatch.setattr("broker.opening.Opened.begin_epoch", full)
    for given, named in (
        (["--keys", str(run.parent / "our keys")], f" --keys '{run.parent / 'our keys'}'"),
        (["--allow-plain-tcp"], " --allow-plain-tcp"),
    ):
        said = refused(capsys, "--resume", str(run), *given, code=75)
        how = f"parablock run --resume {run}" if launched else f"parablock broker --resume {run}{named}"
        assert said.endswith(f"go on with it: {how}\n")


def test_another_key_of_the_broker_is_told(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.opening.Opened.begin_epoch", full)
    refused(capsys, "--resume", str(run), code=75)
    before = Invite.read(run / "invite.toml").broker
    assert "ANOTHER KEY" not in refused(capsys, "--resume", str(run), code=75)
    public = new_pair(run.parent / "keys", BROKER)
    said = refused(capsys, "--resume", str(run), "--keys", str(run.parent / "keys"), code=75)
    assert f"THE BROKER HAS ANOTHER KEY than before: {public.fingerprint}, and it was {fingerprint(before)}" in said
    assert f"each needs a new invite (parablock invite {run} --endpoint" in said
    (run / "invite.toml").write_text("kind =")
    assert "invite.toml is no invite" in refused(capsys, "--resume", str(run), code=75)


def test_a_run_that_goes_on_takes_its_own_throw_away_keys_and_no_others(run: Path) -> None:
    own = new_pair(run / "keys", BROKER)
    arguments = parser().parse_args(["--resume", str(run)])
    door = _door(arguments)
    assert door is not None
    assert door.public != own.key, "somebody's, and not the run's"
    door.close()
    shutil.rmtree(run / "keys")
    make_throw_away(run / "keys", ["worker-0"])
    door = _door(arguments)
    assert door is not None
    assert (door.folder, door.clients) == (run / "keys", ["worker-0"])
    door.close()


@pytest.mark.parametrize(("code", "given", "left"), [(0, False, False), (75, False, True), (0, True, True)])
def test_throw_away_keys_go_with_the_run_that_is_complete(
    run: Path, code: int, given: bool, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """given: by `parablock run`, which waits for its workers before it deletes them."""

    async def ends(*_: object) -> int:
        return code

    make_throw_away(run / "keys", ["worker-0"])
    monkeypatch.setattr("broker.__main__._run", ends)
    monkeypatch.setattr("broker.__main__.tune", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main(["--resume", str(run), *(["--keys", str(run / "keys")] if given else [])]) == code
    assert (run / "keys").exists() == left


def test_a_client_that_was_revoked_while_no_broker_served_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path / "run").opened.close()
    monkeypatch.setattr("parablock.coordinator.Coordinator.expected", property(lambda _self: ["a", "b"]))
    folder = tmp_path / "keys"
    new_pair(folder, BROKER)
    allow(folder, new_pair(folder, "b"), "noon")
    asked: list[Event] = []

    async def scenario() -> None:
        opened = resume(tmp_path / "run", None, [])
        socket = RouterSocket("tcp://127.0.0.1:*", Authenticator(folder))
        with monkeypatch.context() as patch:
            patch.setattr(Broker, "_handle", lambda _self, event: asked.append(event))
            broker = Broker(opened, socket)
        broker._fold.close()
        broker._disk.close()
        broker._record.close()
        socket.close()
        opened.close()

    asyncio.run(scenario())
    assert asked == [Revoked("a")]


def test_a_run_with_another_config_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--resume", str(run), "--set", "server.lr=0.5")
    assert "server.lr was 0.01 when the run began, and would be 0.5 now" in said
    assert "what may change: data.eval, data.train, journal.keep, network.bind" in said


def test_a_run_in_use_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder.open(run) as folder:
        folder.lock("noon")
        assert "since noon); stop that first" in refused(capsys, "--resume", str(run))


def test_a_newer_journal_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect(run / "journal.sqlite") as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    assert "install a newer parablock" in refused(capsys, "--resume", str(run))


def test_damage_that_nobody_can_repair_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run / "manifest.json")
    assert "manifest.json is damaged" in refused(capsys, "--resume", str(run))


def test_a_damaged_record_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").write_text("{torn\n")
    assert "metrics.jsonl, line 1 is not valid JSON" in refused(capsys, "--resume", str(run))


def test_the_port_of_the_broker_before_is_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = RouterSocket("tcp://127.0.0.1:*")
    (run / "endpoint").write_text(other.endpoint + "\n")
    assert f"{other.endpoint} is in use" in refused(capsys, "--resume", str(run))
    other.close()
    bind = "network.bind=tcp://10.0.0.1:5557"
    said = refused(capsys, "--resume", str(run), "--allow-plain-tcp", "--set", bind)
    assert "tcp://10.0.0.1:5557 is beyond this machine, where nothing goes unencrypted" in said
    resume(run, None, []).close()  # and nobody holds it


def test_a_port_that_is_taken_changes_nothing_in_the_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = RouterSocket("tcp://127.0.0.1:*")
    (run / "endpoint").write_text(other.endpoint + "\n")
    damage(run / "blocks" / "0000-000005.safetensors")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "is in use" in refused(capsys, "--resume", str(run), "--set", "journal.keep=5")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    other.close()


def test_any_port_will_do_for_workers_that_are_started_anew(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = RouterSocket("tcp://127.0.0.1:*")
    (run / "endpoint").write_text(other.endpoint + "\n")
    opened, socket = _resume(parser().parse_args(["--resume", str(run), "--any-port"]))
    assert socket.endpoint != other.endpoint
    assert (run / "endpoint").read_text() == socket.endpoint + "\n"
    assert f"{other.endpoint} is taken; listening on {socket.endpoint} instead" in capsys.readouterr().err
    for each in (opened, socket, other):
        each.close()


def test_a_run_is_new_or_it_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--resume", str(run), "--out", "elsewhere"])
    assert caught.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


class Deaf:
    """A socket that nobody is connected to."""

    def __init__(self) -> None:
        self.door: Any = None
        self.dropped: list[tuple[bytes, str | None]] = []

    def listen(self, _on_frames: Any, _on_broken: Any, _window_bytes: int, _clients: int) -> None: ...

    def drop(self, peer: bytes, client: str | None) -> None:
        self.dropped.append((peer, client))

    def send(self, _peer: bytes, _frames: Any) -> bool:
        return False

    def close(self) -> None: ...


def test_what_is_said_of_the_quorum_is_said_of_no_stranger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(tmp_path / "run").opened.close()

    async def scenario() -> None:
        opened = resume(tmp_path / "run", None, [])
        broker = Broker(opened, Deaf())  # type: ignore[arg-type]
        broker._note(Note("quorum", "", "round 0: 1 of at least 2 clients are there; rounds wait"), 0.0)
        broker._fold.close()
        broker._disk.close()
        broker._record.close()
        opened.close()

    asyncio.run(scenario())
    said = capsys.readouterr().err
    assert "the broker quorum: round 0: 1 of at least 2 clients are there" in said
    assert "stranger" not in said


class Bars:
    """A door that only notes who is to stay out."""

    def __init__(self) -> None:
        self.clients: list[str] = []
        self.barred: dict[str, float] = {}

    def listen(self, *_: Any) -> None: ...

    def bar(self, client: str, until: float) -> None:
        self.barred[client] = until - time.monotonic()


def test_who_breaks_the_protocol_is_cut_off_and_named_and_the_door_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(tmp_path / "run").opened.close()
    socket = Deaf()
    socket.door = Bars()

    async def scenario() -> None:
        opened = resume(tmp_path / "run", None, [])
        broker = Broker(opened, socket)  # type: ignore[arg-type]
        broker._on_frames(b"p", [memoryview(b"\xc1")], "mallory")
        broker._on_broken(b"q", "more than it may", "trent")
        broker._on_frames(b"r", [memoryview(b"\xc1")], None)
        broker._fold.close()
        broker._disk.close()
        broker._record.close()
        opened.close()

    asyncio.run(scenario())
    assert socket.dropped == [(b"p", "mallory"), (b"q", "trent"), (b"r", None)]
    assert socket.door.barred == {"mallory": pytest.approx(10.0, abs=5), "trent": pytest.approx(10.0, abs=5)}
    said = capsys.readouterr().err
    assert "mallory dropped: broke the protocol: the header is not a map" in said
    assert "trent dropped: broke the protocol: more than it may; not let in for 10 s" in said
    assert "a stranger dropped: a stranger broke the protocol" in said
    events = RunFolder.open(tmp_path / "run").read_events()
    assert [event["client"] for event in events if event["kind"] == "dropped"] == ["mallory", "trent", ""]


def test_what_cannot_be_stored_is_not_said_and_tried_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = begun(tmp_path / "run")
    left = killed(desk, tmp_path / "left")
    commit = desk.store.commit
    asked: list[tuple[Store, Any]] = []
    monkeypatch.setattr(desk.store, "commit", lambda *arguments: asked.append(arguments) or commit(*arguments))
    desk.hold(counted=False)
    desk.opened.close()
    store, _ = asked[0]

    append, tries = Journal.append, 0

    def full(journal: Journal, row: Any) -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(journal, row)

    monkeypatch.setattr(server, "_DISK_RETRY_S", 0.01)
    monkeypatch.setattr(Journal, "append", full)

    async def scenario() -> list[Event]:
        opened = resume(left, None, [])
        broker = Broker(opened, Deaf())  # type: ignore[arg-type]
        heard: list[Event] = []
        stored = asyncio.get_running_loop().create_future()

        def handle(event: Event) -> None:
            heard.append(event)
            assert opened.journal.next_round == 1, "it is in the journal before it is told"
            stored.set_result(None)

        monkeypatch.setattr(broker, "_handle", handle)
        broker._keep(server._Kept(store, None))
        await asyncio.wait_for(stored, 20)
        broker._fold.close()
        broker._disk.close()
        broker._record.close()
        opened.close()
        return heard

    assert asyncio.run(scenario()) == [Stored(0, 0, None)]
    assert tries == 4
    assert capsys.readouterr().err.count("cannot store round 0: [Errno 28] No space left on device; trying again") == 3
    with Journal.open(left / "journal.sqlite") as journal:
        assert journal.next_round == 1


@pytest.mark.parametrize("program", [command, worker_command], ids=["broker", "worker"])
def test_without_uvloop_asyncio_has_a_loop_too(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "uvloop", None)
    assert program.loop_factory() is asyncio.new_event_loop
    assert "uvloop is not installed here" in capsys.readouterr().err
