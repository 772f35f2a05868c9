"""Throw-away keys for a benchmark's processes: a broker's, one for each client, and what they need on their command
lines to meet encrypted. A plain ring is for measuring what that costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.pairs import new_pair
from parablock.allow_list import AllowList, Client
from parablock.invite import Invite
from parablock.keys import BROKER, SECRET

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_NOWHERE = "tcp://127.0.0.1:9"  # clients are told where the broker listens


class Keyring:
    """folder: new; keys and the invite go there. clients: as they will be called."""

    def __init__(self, folder: Path, clients: Sequence[str], *, plain: bool = False) -> None:
        self.folder = folder
        self.plain = plain
        if plain:
            return
        broker = new_pair(folder, BROKER)
        AllowList(tuple(Client(name, new_pair(folder, name).key, "") for name in clients)).write(folder)
        self._invite = folder / "invite.toml"
        Invite(_NOWHERE, broker.key).write(self._invite)

    @property
    def broker(self) -> tuple[str, ...]:
        """Options of `parablock broker`."""
        return ("--allow-plain-tcp",) if self.plain else ("--keys", str(self.folder))

    @property
    def light(self) -> tuple[str, ...]:
        """Options of `bench.light` and `bench.light_broker`."""
        return () if self.plain else ("--keys", str(self.folder))

    def client(self, name: str, endpoint: str) -> tuple[str, ...]:
        """Options of `parablock worker` and `parablock plan`, for a broker at `endpoint`."""
        place = ("--broker", endpoint)
        if self.plain:
            return ("--allow-plain-tcp", *place)
        return (*place, "--invite", str(self._invite), "--key", str(self.folder / f"{name}{SECRET}"))
