"""Endpoints: which addresses are addresses, and which ones may be used without encryption."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock.network import EndpointError, check_endpoint, is_everywhere, on_this_machine


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://127.0.0.1:5557",
        "tcp://127.0.0.1:1",
        "tcp://127.0.0.1:65535",
        "tcp://127.8.9.10:5557",
        "tcp://localhost:5557",
        "tcp://[::1]:5557",
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_this_machine_may_always_be_used(endpoint: str, plain: bool) -> None:
    check_endpoint(endpoint, plain=plain)


@pytest.mark.parametrize(
    ("everywhere", "here"),
    [
        ("tcp://0.0.0.0:5557", "tcp://127.0.0.1:5557"),
        ("tcp://*:5557", "tcp://127.0.0.1:5557"),
        ("tcp://[::]:5557", "tcp://[::1]:5557"),
        ("tcp://[0:0::0]:5557", "tcp://[::1]:5557"),
    ],
)
def test_everywhere_is_no_place_to_go_to(everywhere: str, here: str) -> None:
    assert is_everywhere(everywhere)
    assert on_this_machine(everywhere) == here


@pytest.mark.parametrize(
    "endpoint", ["tcp://10.0.0.1:5557", "tcp://[::1]:1", "tcp://broker.example.org:5557", "tcp://[2001:db8::]:1"]
)
def test_an_address_is_one_place(endpoint: str) -> None:
    assert not is_everywhere(endpoint)
    assert on_this_machine(endpoint) == endpoint


def test_any_port_only_where_one_listens() -> None:
    check_endpoint("tcp://127.0.0.1:*", any_port=True)
    with pytest.raises(EndpointError, match="port from 1 to 65535"):
        check_endpoint("tcp://127.0.0.1:*")


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://10.0.0.1:5557",
        "tcp://0.0.0.0:5557",
        "tcp://*:5557",
        "tcp://broker.example.org:5557",
        "tcp://localhost.example.org:5557",
        "tcp://127.0.0.1.example.org:5557",
        "tcp://127.1:5557",
        "tcp://[::]:5557",
        "tcp://[2001:db8::1]:5557",
    ],
)
def test_plain_tcp_off_loopback_is_refused(endpoint: str) -> None:
    check_endpoint(endpoint)
    with pytest.raises(EndpointError) as caught:
        check_endpoint(endpoint, plain=True)
    assert str(caught.value).startswith(f"{endpoint} is beyond this machine, where nothing goes unencrypted")
    assert "parablock invite" in str(caught.value)


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "127.0.0.1:5557",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://:5557",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:00000",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:655360",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:port",
        "tcp://127.0.0.1:５５５７",  # digits, but not those of an address
        "tcp://127.0.0.1:5557\n",
        " tcp://127.0.0.1:5557",
        "tcp://a b:5557",
        "tcp://::1:5557",
        "TCP://127.0.0.1:5557",
        "udp://127.0.0.1:5557",
        "ipc:///tmp/socket",
        "inproc://x",
        "tcp://127.0.0.1:5557/path",
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_what_is_no_endpoint_is_refused_with_its_form(endpoint: str, plain: bool) -> None:
    with pytest.raises(
        EndpointError, match=r"an endpoint is tcp://HOST:PORT with a port from 1 to 65535; got "
    ) as caught:
        check_endpoint(endpoint, plain=plain)
    assert repr(endpoint) in str(caught.value)


@given(st.text() | st.from_regex(r"tcp://[^\n]*:[0-9]+", fullmatch=True))
def test_whatever_comes_is_taken_or_is_an_endpoint_error(endpoint: str) -> None:
    here = endpoint.startswith(("tcp://127.", "tcp://localhost:", "tcp://["))
    try:
        check_endpoint(endpoint, plain=True)
    except EndpointError:
        return
    assert here
