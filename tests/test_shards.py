"""Dividing rows over clients: each row once, by the seed alone, as uneven as the settings say; and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock.sections import Partition
from parablock.shards import ShardCounts, ShardsError, digest, divide, shown_label

if TYPE_CHECKING:
    from numpy.typing import NDArray

METHODS = ("iid", "dirichlet", "field", "quantity")


def divided(method: str, labels: list[str], clients: int, alpha: float = 0.5, seed: int = 0) -> NDArray[np.int64]:
    settings = Partition(method=method, alpha=alpha, field="task")  # type: ignore[arg-type]
    return divide(settings, len(labels), labels, clients, seed)


def refusal(*arguments: Any, **changes: Any) -> str:
    with pytest.raises(ShardsError) as caught:
        divided(*arguments, **changes)
    return str(caught.value)


def outcome(*arguments: Any) -> NDArray[np.int64] | str:
    """The owners, or the ShardsError's message."""
    try:
        return divided(*arguments)
    except ShardsError as error:
        return str(error)


def shares(owners: NDArray[np.int64], labels: list[str], clients: int) -> NDArray[np.float64]:
    """Each client's share of each label: shape (labels, clients)."""
    held = Counter(zip(labels, owners.tolist(), strict=True))
    table = np.array([[held[label, client] for client in range(clients)] for label in sorted(set(labels))])
    return table / table.sum(axis=1, keepdims=True)


# Every method


@pytest.mark.parametrize("method", METHODS)
@given(
    labels=st.lists(st.sampled_from("abcdefgh"), max_size=60),
    clients=st.integers(1, 9),
    alpha=st.sampled_from([1e-300, 0.01, 0.5, 10.0, 1e6]),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_row_is_one_clients_and_nobody_is_empty(
    method: str, labels: list[str], clients: int, alpha: float, seed: int
) -> None:
    owners = outcome(method, labels, clients, alpha, seed)
    if isinstance(owners, str):
        check_refusal(owners, method, labels, clients, alpha)
        return
    assert clients <= (len(set(labels)) if method == "field" else len(labels))
    assert owners.shape == (len(labels),)
    assert owners.dtype == np.int64
    assert set(owners.tolist()) == set(range(clients))


def check_refusal(message: str, method: str, labels: list[str], clients: int, alpha: float) -> None:
    """It is refused for the reason that there is, and only where somebody cannot or may well have no row."""
    if len(labels) < clients:
        assert message.startswith(f"it has {len(labels)} rows for {clients} clients")
    elif method == "field":
        values = len(set(labels))
        assert values < clients
        assert message.startswith(f"the field 'task' has {values} value")
    else:
        assert method != "iid"
        found = re.match(r"clients? ([\d, ]+) would have no rows \(rows by client, from 0: ([\d, ]+)\)", message)
        assert found is not None, message
        empty, held = ([int(number) for number in part.split(", ")] for part in found.groups())
        assert len(held) == clients
        assert sum(held) == len(labels)
        assert empty == [client for client in range(clients) if held[client] == 0] != []
        # With shares all but equal, two rows a client of what is shared out at once are enough for everybody.
        most = max(Counter(labels).values()) if method == "dirichlet" else len(labels)
        assert alpha < 1e6 or most < 2 * clients, "there was enough for everybody"


@pytest.mark.parametrize(("method", "labels"), [("dirichlet", ["a"] * 8 + ["b"]), ("quantity", list("aabbccdd"))])
def test_two_rows_a_client_and_shares_all_but_equal_leave_nobody_empty(method: str, labels: list[str]) -> None:
    for seed in range(200):
        assert set(divided(method, labels, 4, alpha=1e6, seed=seed).tolist()) == {0, 1, 2, 3}


# Small, whole, and written down: what one version of numpy draws, so that a change of ours or of numpy's is seen.
GOLDEN = {
    "iid": [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2],
    "dirichlet": [2, 2, 1, 1, 0, 1, 1, 2, 1, 2, 2, 1, 1, 0, 0],
    "field": [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0],
    "quantity": [0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 2, 1],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_division_is_what_it_was(method: str) -> None:
    owners = divided(method, list("aaaabbbbccccddd"), 3, alpha=1.0, seed=11)
    assert owners.tolist() == GOLDEN[method]


def test_a_digest_is_of_every_rows_client() -> None:
    owners = np.array([0, 1, 2], dtype=np.int64)
    whole = hashlib.sha256(b"".join(client.to_bytes(8, "little") for client in (0, 1, 2))).hexdigest()
    assert digest(owners) == whole[:16]
    assert digest(owners.astype(">i8")) == whole[:16]
    assert digest(owners[::-1]) != whole[:16]


@pytest.mark.parametrize("method", METHODS)
def test_one_client_has_everything(method: str) -> None:
    assert divided(method, list("abcab"), 1).tolist() == [0] * 5


def test_rows_in_turn_are_what_they_always_were() -> None:
    assert divided("iid", list("aabbccd"), 3, seed=9).tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("method", ["dirichlet", "quantity"])
def test_the_seed_decides_and_nothing_else(method: str) -> None:
    labels = ["häuser", "b", "c"] * 100
    once = divided(method, labels, 4, alpha=3.0)
    assert (divided(method, labels, 4, alpha=3.0) == once).all()
    assert (divided(method, labels, 4, alpha=3.0, seed=1) != once).any()


def test_other_processes_divide_alike() -> None:
    code = """
import json
from parablock.sections import Partition
from parablock.shards import divide
labels = ["häuser", "b", "c"] * 100
ways = [Partition(method=method, alpha=3.0, field="task") for method in ("dirichlet", "field", "quantity")]
print(json.dumps([divide(way, 300, labels, 3, 5).tolist() for way in ways]))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    labels = ["häuser", "b", "c"] * 100
    here = [divided(method, labels, 3, alpha=3.0, seed=5).tolist() for method in ("dirichlet", "field", "quantity")]
    assert json.loads(done.stdout) == here


# Dirichlet


def test_a_large_alpha_shares_every_label_out_evenly() -> None:
    labels = ["a"] * 4000 + ["b"] * 8000
    found = shares(divided("dirichlet", labels, 4, alpha=1e4), labels, 4)
    # A share's standard deviation is sqrt(1/4 · 3/4 / (4 alpha + 1)) = 0.0022, and a row of rounding 0.00025.
    assert np.abs(found - 0.25).max() < 5 * 0.0022


def test_shares_scatter_as_the_distribution_says() -> None:
    labels = [f"label {number}" for number in range(800) for _ in range(200)]
    found = shares(divided("dirichlet", labels, 4, alpha=0.5), labels, 4)
    assert np.abs(found.mean(axis=0) - 0.25).max() < 4 * np.sqrt(0.0625 / 800)
    # 1/4 · 3/4 / (4 · 0.5 + 1), for every client; the standard error of it over 800 labels is below a twentieth.
    assert np.abs(found.var(axis=0) / 0.0625 - 1).max() < 0.2


def test_a_small_alpha_gives_a_label_to_nearly_one_client() -> None:
    labels = [f"label {number}" for number in range(100) for _ in range(50)]
    found = shares(divided("dirichlet", labels, 4, alpha=0.01), labels, 4)
    assert found.max(axis=1).mean() > 0.95
    assert len(set(found.argmax(axis=1).tolist())) == 4  # but not all of them to the same


def test_which_rows_of_a_label_a_client_has_is_drawn_too() -> None:
    owners = divided("dirichlet", ["a"] * 1000, 2, alpha=1e4)
    assert owners[:500].mean() == pytest.approx(0.5, abs=0.1)


def test_a_labels_rows_do_not_depend_on_the_other_labels() -> None:
    alone = divided("dirichlet", ["a"] * 200, 3, alpha=5.0)
    among = divided("dirichlet", ["b", "a"] * 200, 3, alpha=5.0)
    assert (among[1::2] == alone).all()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_labels_of_few_rows_are_shared_out_evenly_too(rows: int) -> None:
    labels = [f"label {number}" for number in range(1000) for _ in range(rows)]
    held = np.bincount(divided("dirichlet", labels, 4, alpha=1e6), minlength=4)
    # A label's count for a client is within a row of rows/4: over 1000 labels its deviation is below sqrt(1000) / 2.
    assert np.abs(held - 250 * rows).max() < 5 * np.sqrt(1000) / 2


def test_over_seeds_nobody_is_better_off() -> None:
    labels = ["a", *"bb", *"ccc", *"dddd"] * 5
    held = np.zeros(4)
    for seed in range(400):
        names = [f"{label}{place // 10}" for place, label in enumerate(labels)]
        owners = outcome("dirichlet", names, 4, 1.0, seed)
        held += np.bincount(owners, minlength=4) if not isinstance(owners, str) else 12.5
    # Of n rows a client has n/4, with a variance of 0.0375 n² by Dir(1) and at most 1/4 by the cut.
    deviation = np.sqrt(400 * 5 * sum(0.0375 * n * n + 0.25 for n in (1, 2, 3, 4)))
    assert np.abs(held - 400 * 12.5).max() < 4.5 * deviation


# Quantity


def test_sizes_differ_but_labels_do_not() -> None:
    labels = ["a", "b"] * 10_000
    owners = divided("quantity", labels, 4, alpha=1.0)
    sizes = np.bincount(owners)
    assert sizes.max() > 2 * sizes.min()
    for client, size in enumerate(sizes.tolist()):
        share = float(np.mean([label == "a" for label, owner in zip(labels, owners, strict=True) if owner == client]))
        assert share == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(size))


def test_sizes_are_even_with_a_large_alpha() -> None:
    sizes = np.bincount(divided("quantity", [""] * 40_000, 4, alpha=1e4))
    assert np.abs(sizes / 40_000 - 0.25).max() < 5 * 0.0022


def test_sizes_scatter_as_the_distribution_says() -> None:
    first = [np.mean(divided("quantity", [""] * 500, 2, alpha=2.0, seed=seed) == 0) for seed in range(300)]
    assert np.mean(first) == pytest.approx(0.5, abs=4 * np.sqrt(0.05 / 300))
    assert np.var(first) == pytest.approx(0.05, rel=0.3)  # 1/2 · 1/2 / (2 · 2 + 1)


# Field


def test_each_value_is_one_clients() -> None:
    labels = list("aaabbc")
    owners = divided("field", labels, 3)
    assert owners.tolist() == [0, 0, 0, 1, 1, 2]
    assert (divided("field", labels, 3, seed=7) == owners).all()


def test_more_values_than_clients_are_spread_by_their_rows() -> None:
    sizes = {"a": 50, "b": 40, "c": 30, "d": 30, "e": 20, "f": 10}
    labels = [label for label, size in sizes.items() for _ in range(size)]
    owners = divided("field", labels, 3)
    values = [{label for label, owner in zip(labels, owners, strict=True) if owner == n} for n in range(3)]
    assert values == [{"a", "f"}, {"b", "e"}, {"c", "d"}]
    assert np.bincount(owners).tolist() == [60, 60, 60]


@given(st.lists(st.integers(1, 30), min_size=3, max_size=20))
def test_no_client_is_ahead_of_another_by_more_than_its_last_value(sizes: list[int]) -> None:
    labels = [str(number) for number, size in enumerate(sizes) for _ in range(size)]
    owners = divided("field", labels, 3)
    held = np.bincount(owners)
    for client in range(3):
        last = min(sizes[int(label)] for label, owner in zip(labels, owners, strict=True) if owner == client)
        assert held[client] - last <= held.min()


# What is refused


@pytest.mark.parametrize("method", METHODS)
def test_more_clients_than_rows(method: str) -> None:
    expected = "it has 3 rows for 4 clients, and each needs at least one; take fewer workers"
    assert refusal(method, list("abc"), 4) == expected


def test_fewer_values_than_clients() -> None:
    message = refusal("field", list("aabb"), 3)
    assert "the field 'task' has 2 values for 3 clients" in message
    assert "take at most 2 workers, or partition.method = dirichlet" in message
    message = refusal("field", list("aaaa"), 3)
    assert "has 1 value for 3 clients" in message
    assert "take at most 1 worker, or" in message


@pytest.mark.parametrize("method", ["dirichlet", "quantity"])
def test_clients_without_rows_are_named_with_what_there_would_be(method: str) -> None:
    message = refusal(method, ["a"] * 9, 3, alpha=1e-9)
    assert message.startswith("clients ")
    assert "would have no rows (rows by client, from 0: " in message
    assert sorted(message[message.index("0: ") + 3 : message.index(")")].split(", ")) == ["0", "0", "9"]
    assert message.endswith("take another seed, a larger partition.alpha or fewer workers")


def test_a_refusal_of_many_clients_is_not_endless() -> None:
    message = refusal("dirichlet", ["a"] * 9000, 5000, alpha=1e-9)
    assert "and 4967 more would have no rows" in message
    assert len(message) < 500


# What it comes to


def test_counts_are_by_client_and_label() -> None:
    labels = list("bbabac")
    settings = Partition(method="iid", field="task")
    counts = ShardCounts.of(settings, divide(settings, 6, labels, 2, 0), labels, 2, 0)
    assert counts.by_client == (3, 3)
    assert dict(counts.by_label) == {"b": (1, 2), "a": (2, 0), "c": (0, 1)}
    assert list(counts.by_label) == ["b", "a", "c"]
    assert counts.summary() == "iid: 6 rows for 2 clients, from 3 to 3 each"
    assert ShardCounts.from_dict(json.loads(json.dumps(counts.to_dict()))) == counts


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_told_from_those_by_other_settings(method: str) -> None:
    settings = Partition(method=method, alpha=100.0, field="task")  # type: ignore[arg-type]
    labels = list("ab") * 50
    counts = ShardCounts.of(settings, divide(settings, 100, labels, 2, 3), labels, 2, 3)
    assert ShardCounts.from_dict(json.loads(json.dumps(counts.to_dict()))).came_of(settings, 3)
    assert not counts.came_of(settings, 4)
    assert not counts.came_of(replace(settings, field="topic"), 3)
    others = [replace(settings, method=other) for other in METHODS if other != method]
    assert not any(counts.came_of(other, 3) for other in others)
    drawn = method in ("dirichlet", "quantity")
    assert counts.came_of(replace(settings, alpha=1.0), 3) != drawn


def test_long_labels_that_begin_alike_are_told_apart() -> None:
    labels = [f"an author with a long name, {number}" for number in (1, 2)]
    counts = ShardCounts("iid", None, "author", 0, (1, 1), {label: (1, 0) for label in labels})
    names = [name for name, _ in counts.columns(10)]
    assert names == ["an author wi…ong name, 1", "an author wi…ong name, 2"]
    assert [shown_label("an author", longest) for longest in (9, 8, 3)] == ["an author", "an a…hor", "a…r"]


@given(labels=st.lists(st.text(max_size=40), min_size=4, max_size=20), method=st.sampled_from(["iid", "quantity"]))
def test_nothing_is_lost_in_the_columns(labels: list[str], method: str) -> None:
    settings = Partition(method=method, alpha=1e3, field="task")  # type: ignore[arg-type]
    counts = ShardCounts.of(settings, divide(settings, len(labels), labels, 2, 0), labels, 2, 0)
    for most in (1, 3, 100):
        columns = counts.columns(most)
        assert len(columns) == min(most, len(set(labels)))
        assert [sum(held[client] for _, held in columns) for client in range(2)] == list(counts.by_client)
        assert all(name.isprintable() and len(name) <= 24 for name, _ in columns)
        if len(set(labels)) > most:
            assert columns[-1][0] == "others"


def test_without_labels_there_are_no_columns() -> None:
    settings = Partition(method="quantity", alpha=100.0)
    counts = ShardCounts.of(settings, divide(settings, 1000, None, 2, 3), None, 2, 3)
    assert counts.columns(9) == []
    assert counts.rows == 1000
    assert counts.summary().startswith("quantity, alpha 100, seed 3: 1,000 rows for 2 clients, from ")


@pytest.mark.parametrize(
    "changes", [{"by_client": []}, {"by_label": {"a": [1]}}, {"by_label": 3}, {"by_client": ["x"]}, {"seed": None}]
)
def test_counts_that_are_damaged_are_refused(changes: dict[str, Any]) -> None:
    whole = {"method": "iid", "alpha": None, "field": "", "seed": 0, "by_client": [1, 2], "by_label": {}}
    assert ShardCounts.from_dict(whole).by_client == (1, 2)
    with pytest.raises((ValueError, TypeError, AttributeError)):
        ShardCounts.from_dict(whole | changes)
    with pytest.raises(KeyError):
        ShardCounts.from_dict({})
