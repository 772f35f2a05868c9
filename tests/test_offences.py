"""Who broke the protocol how often: what is counted, what is barred and for how long, what is worth a line."""

from __future__ import annotations

from parablock.offences import Offence, Offences


def test_a_bar_doubles_from_ten_seconds_to_an_hour() -> None:
    offences = Offences()
    bars = [offences.add("a", 0.0, proven=True) for _ in range(12)]
    assert [offence.barred_s for offence in bars] == [10.0 * 2**n for n in range(9)] + [3600.0] * 3
    assert [offence.number for offence in bars] == list(range(1, 13))
    assert offences.add("b", 0.0, proven=True) == Offence(1, 10.0, told=True), "each has its own count"
    many = [offences.add("a", 0.0, proven=True) for _ in range(2000)]
    assert many[-1].barred_s == 3600.0


def test_a_bar_ends_and_the_count_stays() -> None:
    offences = Offences()
    assert offences.barred_s("a", 0.0) == 0.0
    assert offences.add("a", 100.0, proven=True).barred_s == 10.0
    assert offences.barred_s("a", 104.0) == 6.0
    assert offences.barred_s("b", 104.0) == 0.0
    assert offences.barred_s(None, 104.0) == 0.0
    assert offences.barred_s("a", 110.0) == 0.0
    assert offences.barred_s("a", 111.0) == 0.0
    assert offences.add("a", 500.0, proven=True).barred_s == 20.0


def test_a_name_that_nothing_proves_is_counted_and_not_barred() -> None:
    offences = Offences()
    assert offences.add("a", 0.0, proven=False) == Offence(1, 0.0, told=True)
    assert offences.barred_s("a", 0.0) == 0.0, "else anybody could bar a"
    assert offences.add("a", 0.0, proven=False).number == 2


def test_of_strangers_ever_fewer_offences_are_told() -> None:
    """Whatever they call themselves."""
    offences = Offences()
    names = (f"n{number}" for number in range(5000))
    told = [offence.number for offence in (offences.add(name, 0.0, proven=False) for name in names) if offence.told]
    assert told == [*range(1, 11), 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]


def test_for_each_hour_without_one_the_count_is_halved() -> None:
    """From the end of the last bar on, during which there could be none."""
    offences = Offences()
    for _ in range(12):
        offence = offences.add("a", 0.0, proven=True)
    assert (offence.number, offence.barred_s) == (12, 3600.0)
    assert offences.add("a", 3600.0 + 3599.0, proven=True).number == 13
    assert offences.add("a", 7199.0 + 3600.0 + 2 * 3600.0, proven=True).number == 13 // 4 + 1


def test_who_is_revoked_is_forgotten() -> None:
    offences = Offences()
    for _ in range(3):
        offences.add("a", 0.0, proven=True)
    offences.forget("a")
    offences.forget("nobody")
    assert offences.barred_s("a", 0.0) == 0.0
    assert offences.add("a", 0.0, proven=True) == Offence(1, 10.0, told=True)
