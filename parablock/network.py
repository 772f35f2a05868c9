"""Where broker and workers may meet: the form of an endpoint, and which ones are allowed without encryption."""

from __future__ import annotations

import ipaddress
import re

_ENDPOINT = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:]+\]|[^:/\s]+):(?P<port>[0-9]{1,5}|\*)")


class EndpointError(ValueError):
    """An address cannot be used; the text says what was expected and what to do."""


def check_endpoint(endpoint: str, *, plain: bool = False, any_port: bool = False) -> None:
    """Raise EndpointError unless `endpoint` is tcp://HOST:PORT, and on this machine where it is `plain`: unencrypted.

    any_port: PORT may be *, as it may where one listens.
    """
    match = _ENDPOINT.fullmatch(endpoint)
    port = match["port"] if match is not None else ""
    if match is None or not (any_port if port == "*" else 0 < int(port) < 65536):
        raise EndpointError(f"an endpoint is tcp://HOST:PORT with a port from 1 to 65535; got {endpoint!r}")
    if plain and not _is_loopback(match["host"].strip("[]")):
        raise EndpointError(
            f"{endpoint} is beyond this machine, where nothing goes unencrypted: leave --allow-plain-tcp out, and use "
            "keys (`parablock keys new`, `parablock invite`)"
        )


def is_everywhere(endpoint: str) -> bool:
    """Whether it is where one may listen, on every address of the machine, and nowhere that one can be reached at."""
    match = _ENDPOINT.fullmatch(endpoint)
    host = "" if match is None else match["host"].strip("[]")
    try:
        return host == "*" or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def on_this_machine(endpoint: str) -> str:
    """Where a broker that listens everywhere is reached by its own machine; another endpoint as it is."""
    if not is_everywhere(endpoint):
        return endpoint
    return f"tcp://{'[::1]' if '[' in endpoint else '127.0.0.1'}:{endpoint.rpartition(':')[2]}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
