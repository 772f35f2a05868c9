"""The same exchange as a Flower app: clients that return what they get at once, and the mean of it.

Run by Flower's own processes, in an environment that has flwr; `bench.flower` copies this file into an app. It imports
nothing of parablock.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg

if TYPE_CHECKING:
    from flwr.client import Client
    from flwr.common import Context


class Echo(NumPyClient):
    """Trains nothing."""

    def fit(self, parameters: Any, config: Any) -> tuple[Any, int, dict[str, Any]]:  # noqa: ARG002 - Flower's signature
        return parameters, 1, {}


class Timed(FedAvg):
    """FedAvg that writes down, for each round: its number, the results in it, when it began, when the mean was made."""

    def __init__(self, report: Path, **options: Any) -> None:
        super().__init__(**options)
        self._report = report
        self._rows: list[tuple[int, int, float, float]] = []
        self._began = 0.0

    def configure_fit(self, *args: Any, **options: Any) -> Any:
        self._began = time.monotonic()
        return super().configure_fit(*args, **options)

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        mean = super().aggregate_fit(server_round, results, failures)
        self._rows.append((server_round, len(results), self._began, time.monotonic()))
        partial = self._report.with_suffix(".partial")
        partial.write_text(json.dumps(self._rows), encoding="utf-8")
        partial.rename(self._report)
        return mean


def _server(context: Context) -> ServerAppComponents:
    settings = context.run_config
    clients = int(settings["clients"])
    block = np.random.default_rng(0).random(int(settings["block-bytes"]) // 4, dtype=np.float32)
    strategy = Timed(
        Path(str(settings["report"])),
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        min_fit_clients=clients,
        min_available_clients=clients,
        initial_parameters=ndarrays_to_parameters([block]),
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(settings["rounds"])))


def _client(context: Context) -> Client:  # noqa: ARG001 - Flower's signature
    return Echo().to_client()


server = ServerApp(server_fn=_server)
client = ClientApp(client_fn=_client)
