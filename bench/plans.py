"""`parablock plan` as the clients of a run would type it: all at once, over given links, against a real broker.

The clients of a run share the cores, so their planners do too. What is made of the predictions is the caller's part.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from bench.keyring import Keyring
from bench.processes import Children
from bench.runs import ENVIRONMENT, PATIENCE_S
from parablock import config

if TYPE_CHECKING:
    from pathlib import Path

    from bench.network import Network


def plans(settings: config.Config, links: Network, folder: Path) -> list[dict[str, Any]]:
    """What each client's planner printed, by client. settings, links: as for `bench.runs.run`; folder: new.

    Raises ChildError, with the ends of the logs, where a process fails or nothing moves any more.
    """
    assert settings.network.bind == links.bind, "the broker must listen where the links lead"
    folder.mkdir()
    config_path, out = folder / "config.toml", folder / "run"
    config_path.write_text(config.to_toml(settings), encoding="utf-8")
    names = [f"planner-{index}" for index in range(len(links.endpoints))]
    ring = Keyring(folder / "keys", names)
    python = (sys.executable, "-m")
    with Children(folder) as children:
        broker_options = (str(config_path), "--out", str(out), *ring.broker)
        children.start("broker", [*links.broker_prefix, *python, "broker", *broker_options], ENVIRONMENT)
        # A planner that came earlier would not wait for the broker so long.
        children.until((out / "endpoint").exists, PATIENCE_S)
        planners = []
        for index, (endpoint, prefix) in enumerate(zip(links.endpoints, links.client_prefixes, strict=True)):
            options = (str(config_path), *ring.client(names[index], endpoint), "--threads", "1", "--json")
            command = [*prefix, *python, "parablock.cli", "plan", *options]
            planners.append(children.start(names[index], command, ENVIRONMENT))

        def progress() -> int:
            return sum(planner.log.stat().st_size for planner in planners)

        for planner in planners:
            children.wait(planner, progress, PATIENCE_S)
    return [json.loads(planner.log.read_text(encoding="utf-8").splitlines()[-1]) for planner in planners]
