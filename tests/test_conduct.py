"""What clients may say, and what is told of how they behave: by whose name the connection proves."""

from __future__ import annotations

import pytest

from parablock.conduct import Conduct
from parablock.messages import Heartbeat
from parablock.sessions import Session
from tests.network import config_of, manifest_of

BEAT = Heartbeat(0.0, 0, 0, "training")


def conduct() -> Conduct:
    return Conduct(config_of(2), manifest_of())


def test_a_client_has_one_quota_at_whatever_address_and_a_stranger_one_at_each() -> None:
    made = conduct()
    said = 0
    while made.excess(b"1", "a", BEAT, 0.0) is None:
        said += 1
        assert said < 1_000_000
    assert made.excess(b"2", "a", BEAT, 0.0) is not None
    assert made.excess(b"1", None, BEAT, 0.0) is None
    assert made.excess(b"2", None, BEAT, 0.0) is None
    made.sent_chunk(Session(b"3", "a", "token", 0.0, client="a"))
    assert made.excess(b"2", "a", BEAT, 0.0) is None, "what is to be answered may be"
    assert made.excess(b"2", "a", BEAT, 0.0) is not None


def test_only_a_name_that_is_proven_is_barred() -> None:
    made = conduct()
    offence, text = made.offend("a", "it lies", 0.0, proven=False)
    assert (offence.barred_s, text) == (0.0, "broke the protocol: it lies")
    assert made.barred_s("a", 0.0) == 0.0
    offence, text = made.offend("a", "it lies", 0.0, proven=True)
    assert text == "broke the protocol: it lies; not let in for 10 s"
    assert made.barred_s("a", 4.0) == 6.0
    assert made.barred_s(None, 4.0) == 0.0
    *_, text = made.offend("a", "it lies", 4.0, proven=True)
    assert text == "broke the protocol: it lies; its offence number 2; not let in for 20 s"
    made.forget("a")
    assert made.barred_s("a", 4.0) == 0.0


@pytest.mark.parametrize("client", ["a", None])
def test_of_many_comings_and_goings_few_are_told(client: str | None) -> None:
    made, session = conduct(), Session(b"1", "a", "token", 0.0, client)
    told = [made.tell(session, "left", 0.0) for _ in range(400)]
    assert told[:100] == [(True, "left")] * 100
    assert [number for number, (worth, _) in enumerate(told, start=1) if number > 100 and worth] == [128, 256]
    assert told[127][1] == "left; number 128 of such events, of which few are told"
