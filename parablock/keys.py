"""Keys: who a broker or a worker is. The files that hold them, their text, and the fingerprint that people compare.

    NAME.secret    kind = "secret", name, key: stays with its owner, mode 0600, refused where others may read it
    NAME.public    kind = "public", name, key: given to whoever shall know NAME

A key is a CURVE25519 key of 32 bytes, written as 40 characters of Z85 (ZeroMQ RFC 32). Pairs are made by libzmq
(`broker.pairs`); nothing is encrypted here.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

from parablock.guarded_file import ExposedError, check_folder, check_mode, read_guarded
from parablock.messages import MAX_NAME, NAME
from parablock.placement import sync_folder

BROKER = "broker"
"""The name of the broker's own key in a keys folder; no client's."""
SECRET, PUBLIC = ".secret", ".public"

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_VALUES = {digit: value for value, digit in enumerate(_DIGITS)}
_CHARACTERS = 40


class KeyFileError(ValueError):
    """A key, its file or a list of keys cannot be used. The message names it and says what to do."""


@dataclass(frozen=True)
class SecretKey:
    """name: of its owner, as the owner calls himself. key: Z85."""

    name: str
    key: str = field(repr=False)


@dataclass(frozen=True)
class PublicKey:
    """name: of its owner, as the owner calls himself. key: Z85."""

    name: str
    key: str

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.key)


def folder_of_user() -> Path:
    """$XDG_CONFIG_HOME/parablock, or ~/.config/parablock."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "parablock"


def make_folder(folder: Path) -> None:
    """Make a folder for keys, nobody else's to look into. Raises KeyFileError where it cannot be, or is there and is
    open to others."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_folder(folder)
    except ExposedError as error:
        raise KeyFileError(str(error)) from error
    except OSError as error:
        raise KeyFileError(f"cannot make the keys folder {folder}: {error.strerror}; choose another --keys") from error


def is_name(name: str) -> bool:
    """Whether it can be one of `parablock.messages.NAME`."""
    return re.fullmatch(NAME, name) is not None and len(name) <= MAX_NAME


def check_name(name: str) -> str:
    """The name. Raises KeyFileError unless it is one."""
    if not is_name(name):
        raise KeyFileError(
            f"a name has 1 to {MAX_NAME} letters, digits, dots, dashes or underscores, and begins with a letter or a "
            f"digit; got {name!r}"
        )
    return name


def raw(key: str) -> bytes:
    """The 32 bytes of a key. Raises KeyFileError where the text is none."""
    if len(key) != _CHARACTERS or not _VALUES.keys() >= set(key):
        raise KeyFileError(f"a key is {_CHARACTERS} characters of Z85, as `parablock keys new` writes them")
    found = b""
    for start in range(0, _CHARACTERS, 5):
        value = 0
        for digit in key[start : start + 5]:
            value = value * 85 + _VALUES[digit]
        if value >= 1 << 32:
            where = f"characters {start + 1} to {start + 5}"  # and not which: it may be a secret
            raise KeyFileError(f"{where} are no Z85, so this is no key; copy it once more")
        found += value.to_bytes(4, "big")
    return found


def fingerprint(key: str) -> str:
    """Of a public key: the first 160 bits of its SHA-256 in base32, in groups of four, to be compared by people."""
    text = base64.b32encode(hashlib.sha256(raw(key)).digest()[:20]).decode()
    return "-".join(text[start : start + 4] for start in range(0, len(text), 4))


def write_pair(folder: Path, secret: SecretKey, public: PublicKey) -> None:
    """Two new files, the secret one its owner's alone; both of them, or none.

    Raises KeyFileError where there is one already, or none can be.
    """
    assert secret.name == public.name
    name = check_name(secret.name)
    parts = [(SECRET, "secret", secret.key, 0o600), (PUBLIC, "public", public.key, 0o644)]
    for suffix, _, key, _ in parts:
        raw(key)
        if os.path.lexists(folder / f"{name}{suffix}"):
            raise _taken(folder / f"{name}{suffix}")
    made: list[Path] = []
    placed: list[Path] = []
    try:
        for suffix, kind, key, mode in parts:
            made.append(folder / f".{name}{suffix}.{token_hex(4)}")
            _write_beside(made[-1], f'kind = "{kind}"\nname = "{name}"\nkey = "{key}"\n', mode)
        for (suffix, *_), beside in zip(parts, made, strict=True):
            os.link(beside, folder / f"{name}{suffix}")  # unlike a rename, over nothing
            placed.append(folder / f"{name}{suffix}")
        sync_folder(folder)
    except BaseException as error:
        made += placed
        if isinstance(error, FileExistsError):
            raise _taken(folder / f"{name}{parts[len(placed)][0]}") from error
        if isinstance(error, OSError):
            raise KeyFileError(f"cannot write {folder / name}: {error.strerror}; choose another --keys") from error
        raise
    finally:
        for path in made:
            path.unlink(missing_ok=True)


def read_secret(path: Path) -> SecretKey:
    """Raises KeyFileError where the file is no secret key, or anybody but its owner may read or change it."""
    try:
        text, mode = read_guarded(path)
        secret = SecretKey(*_parsed(path, text, "secret"))
        check_mode(path, mode, secret=True)
    except ExposedError as error:
        raise KeyFileError(str(error)) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    return secret


def read_public(path: Path) -> PublicKey:
    """Raises KeyFileError where the file is no public key. It may lie anywhere, and be anybody's: people compare its
    fingerprint."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    name, key = _parsed(path, text, "public")
    return PublicKey(name, key)


def _write_beside(path: Path, text: str, mode: int) -> None:
    """Never for a moment readable by others than `mode` says."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, mode), "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _taken(path: Path) -> KeyFileError:
    return KeyFileError(f"{path} is there already; choose another name, or another --keys, or move it away first")


def _parsed(path: Path, text: bytes, kind: str) -> tuple[str, str]:
    try:
        tree = tomllib.loads(text.decode("utf-8"))
        found, name, key = tree["kind"], tree["name"], tree["key"]
        if not all(isinstance(value, str) for value in (found, name, key)):
            raise TypeError("expected text")
    except (ValueError, KeyError, TypeError) as error:
        raise KeyFileError(
            f"{path} is no key file ({type(error).__name__}); `parablock keys new NAME` makes one, with a kind, a "
            "name and a key"
        ) from error
    if found not in ("secret", "public", "invite"):
        raise KeyFileError(f"{path} is no key file; `parablock keys new NAME` makes one")
    if found != kind:
        wanted = {
            "secret": "here a secret key is needed: NAME.secret, of the same pair, which its owner has",
            "public": "here a public key is needed: NAME.public, of the same pair. Never give a secret key to anybody; "
            "one that you were given, or have sent, is to be made anew",
        }
        what = "is an invite" if found == "invite" else f"holds a {found} key"
        raise KeyFileError(f"{path} {what}, and {wanted[kind]}")
    if not is_name(name):  # nor is that shown: who has written the file may have changed it for the key
        raise KeyFileError(f"{path} holds no usable key: its name is none")
    try:
        raw(key)
    except KeyFileError as error:
        raise KeyFileError(f"{path} holds no usable key: {error}") from error
    return name, key


def _unreadable(path: Path, error: OSError) -> KeyFileError:
    if isinstance(error, FileNotFoundError):
        return KeyFileError(f"there is no key file {path}; make a pair with `parablock keys new {path.stem}`")
    return KeyFileError(f"cannot read the key file {path}: {error.strerror}")
