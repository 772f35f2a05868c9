"""The broker's list of the clients that it lets in: `clients.toml` in its keys folder. Who is not on it is nobody.

A name has one key and a key one name. The file takes its place whole, and one process at a time changes it; a broker
that serves reads it anew when it has changed (`broker.authenticator`).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parablock import keys
from parablock.folder_lock import FolderLock, LockedError
from parablock.guarded_file import ExposedError, check_mode, read_guarded
from parablock.keys import KeyFileError, PublicKey
from parablock.placement import write_text

if TYPE_CHECKING:
    from pathlib import Path

FILE = "clients.toml"

_FIELDS = {"name", "key", "since"}


@dataclass(frozen=True)
class Client:
    """since: when it was let in, for people."""

    name: str
    key: str
    since: str

    @property
    def fingerprint(self) -> str:
        return keys.fingerprint(self.key)


class AllowList:
    """The clients, in the order in which they were let in."""

    def __init__(self, clients: tuple[Client, ...] = ()) -> None:
        """Raises KeyFileError where a name or a key comes twice, or is none."""
        self.clients = clients
        self.names: dict[str, str] = {}
        """Who has a key, by the key."""
        seen: set[str] = set()
        for client in clients:
            keys.check_name(client.name)
            keys.raw(client.key)
            if client.name == keys.BROKER:
                raise KeyFileError(f"{keys.BROKER} is the broker's own name; let the client in as --name ANOTHER")
            if client.name in seen:
                raise KeyFileError(
                    f"there is a client {client.name} already; choose --name ANOTHER, or first take that one off: "
                    f"`parablock keys revoke {client.name}`"
                )
            if client.key in self.names:
                raise KeyFileError(
                    f"the key of {client.name} (fingerprint {client.fingerprint}) is that of {self.names[client.key]} "
                    "already; each client makes a pair of its own"
                )
            seen.add(client.name)
            self.names[client.key] = client.name

    @classmethod
    def read(cls, folder: Path) -> AllowList:
        """The list in a keys folder; an empty one where there is none. Raises KeyFileError."""
        path = folder / FILE
        try:
            text, mode = read_guarded(path)
            check_mode(path, mode, secret=False)
        except FileNotFoundError:
            return cls()
        except ExposedError as error:
            raise KeyFileError(str(error)) from error
        except OSError as error:
            raise KeyFileError(f"cannot read {path}: {error.strerror}") from error
        try:
            tree = tomllib.loads(text.decode("utf-8"))
            if unknown := sorted(tree.keys() - {"client"}):
                raise KeyFileError(f"it has {', '.join(unknown)}, and holds nothing but [[client]] entries")
            return cls(tuple(_client(entry) for entry in tree.get("client", [])))
        except KeyFileError as error:
            raise KeyFileError(f"{path} is wrong: {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise KeyFileError(
                f"{path} is damaged: {error!r}; restore it, or delete it and let the clients in anew "
                "(`parablock keys allow FILE.public`)"
            ) from error

    def write(self, folder: Path) -> None:
        """Raises OSError where the disk refuses; then the old one is still there. KeyFileError where it was written and
        a broker will not read the same."""
        lines = ["# Who may take part: written by `parablock keys allow` and `revoke`."]
        for client in self.clients:
            lines += [
                "",
                "[[client]]",
                *(f'{field} = "{getattr(client, field)}"' for field in ("name", "key", "since")),
            ]
        write_text(folder / FILE, "\n".join(lines) + "\n", mode=0o600)
        if AllowList.read(folder).clients != self.clients:
            raise KeyFileError(
                f"{folder / FILE} is not what was written just now; look at it, and at who else changes it"
            )

    def gone(self, newer: AllowList) -> list[str]:
        """Names whose key here is not theirs in a newer list."""
        return sorted(name for key, name in self.names.items() if not self.same(newer, key))

    def same(self, newer: AllowList, key: str) -> bool:
        """Whether a key is on both lists, as the same client's."""
        return key in self.names and self.names[key] == newer.names.get(key)


def allow(folder: Path, public: PublicKey, since: str, name: str = "") -> Client:
    """Let a client in, under the name that its key file says or another one. Raises KeyFileError, OSError."""
    client = Client(name or public.name, public.key, since)
    with _Changing(folder, since):
        AllowList((*AllowList.read(folder).clients, client)).write(folder)
    return client


def revoke(folder: Path, name: str, now: str) -> Client:
    """Take a client off the list. Raises KeyFileError where it is not on it, OSError."""
    with _Changing(folder, now):
        clients = AllowList.read(folder).clients
        found = [client for client in clients if client.name == name]
        if not found:
            there = ", ".join(client.name for client in clients) or "nobody"
            raise KeyFileError(f"there is no client {name} on the list {folder / FILE}; there is: {there}")
        AllowList(tuple(client for client in clients if client.name != name)).write(folder)
    return found[0]


class _Changing:
    """The keys folder is one process's to change."""

    def __init__(self, folder: Path, since: str) -> None:
        keys.make_folder(folder)
        try:
            self._lock = FolderLock(folder, since, "parablock keys", private=True)
        except LockedError as error:
            raise KeyFileError(str(error)) from error

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _client(entry: Any) -> Client:
    if set(entry) != _FIELDS or not all(isinstance(value, str) for value in entry.values()):
        raise ValueError(f"a client has {', '.join(sorted(_FIELDS))}, each a text; got {sorted(entry)}")
    return Client(**entry)
