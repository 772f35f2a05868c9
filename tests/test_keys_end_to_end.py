"""Keys of real processes while a run goes on: who is let in, who is not, who is cut off; and a broker's new key."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from broker import keys_command
from broker.pairs import new_pair
from parablock.keys import BROKER, PUBLIC, SECRET, read_public
from tests.processes import Processes, wait_for

if TYPE_CHECKING:
    from pathlib import Path

FAST = {"round.quorum": 1, "network.heartbeat_s": 0.2, "network.timeout_s": 5.0, "network.resend_s": 1.0}


def newest(processes: Processes) -> list[str]:
    rows = processes.folder_of_run().read_metrics()
    return rows[-1].get("contributors", []) if rows else []


def keys(processes: Processes, *arguments: str) -> None:
    assert keys_command.main([*arguments, "--keys", str(processes.keys)]) == 0


def test_a_run_lets_in_and_cuts_off_as_the_list_says(tmp_path: Path) -> None:
    new_pair(tmp_path / "theirs", "them")
    theirs = ("--key", str(tmp_path / "theirs" / f"them{SECRET}"))
    with Processes(tmp_path, rounds=5000, **FAST) as processes:
        workers = [processes.worker(index) for index in range(2)]
        wait_for(lambda: newest(processes) == ["worker-0", "worker-1"])

        stranger = processes.worker(2, *theirs)
        assert stranger.wait(timeout=30) == 3
        fingerprint = read_public(tmp_path / "theirs" / f"them{PUBLIC}").fingerprint
        assert f"does not let our key in (fingerprint {fingerprint})" in processes.said(2)
        assert "`parablock keys allow`" in processes.said(2)
        assert f"the key with the fingerprint {fingerprint} is not on the list" in processes.broker_log.read_text()

        keys(processes, "revoke", "worker-1")
        assert workers[1].wait(timeout=30) == 3
        assert "revoked the key of this worker" in processes.said(1)
        wait_for(lambda: newest(processes) == ["worker-0"])
        assert processes.worker(1).wait(timeout=30) == 3, "nor is it let in again"

        keys(processes, "allow", str(tmp_path / "theirs" / f"them{PUBLIC}"), "--name", "hospital-2")
        allowed = processes.worker(2, *theirs)
        wait_for(lambda: newest(processes) == ["hospital-2", "worker-0"] or allowed.poll() is not None)
        assert allowed.poll() is None, processes.said(2)
        assert "calls this worker hospital-2, not them" in processes.said(2)
        assert workers[0].poll() is None
    kinds = {(event["kind"], event.get("client")) for event in processes.folder_of_run().read_events()}
    assert {("revoked", "worker-1"), ("joined", "hospital-2")} <= kinds


def test_a_broker_with_a_new_key_is_told_from_the_old_one_and_a_new_invite_goes_on(tmp_path: Path) -> None:
    with Processes(tmp_path, rounds=5000, **FAST, **{"round.clients": 1}) as processes:
        old = processes.worker(0)
        wait_for(lambda: newest(processes) == ["worker-0"])
        processes.broker.send_signal(signal.SIGTERM)
        assert processes.broker.wait(timeout=30) == 75
        for kind in (SECRET, PUBLIC):
            (processes.keys / f"{BROKER}{kind}").rename(processes.keys / f"{BROKER}{kind}.old")
        keys(processes, "new", BROKER)
        processes.resume()
        wait_for(lambda: "the broker has another key than the invite says" in processes.said(0))
        assert "ask its owner for a new invite" in processes.said(0)
        old.send_signal(signal.SIGTERM)
        assert old.wait(timeout=30) == 75
        before = len(processes.folder_of_run().read_metrics())

        again = processes.worker(0, "--invite", str(processes.out / "invite.toml"))
        wait_for(lambda: len(processes.folder_of_run().read_metrics()) > before + 2 or again.poll() is not None)
        assert again.poll() is None, processes.said(0)
        assert "going on from" in processes.said(0)
