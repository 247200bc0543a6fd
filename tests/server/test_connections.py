"""Which connection is closed where there are too many, and what counts as one network."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fedward.connections import ConnectionLimits, Table, Unidentified, identified, network_of


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7/32"),
        ("::ffff:192.0.2.7", "192.0.2.7/32"),
        ("2001:db8::1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("x", ""),
    ],
)
def test_what_counts_as_one_network(address: str, network: str) -> None:
    assert network_of(address) == network


def test_the_oldest_of_the_network_that_has_the_most_is_closed() -> None:
    async def run() -> None:
        table, closed = Table(ConnectionLimits(total=5, per_network=3)), list[str]()

        def arrive(name: str) -> Unidentified:
            return Unidentified(table, name[0], lambda: closed.append(name))

        arrive("a1"), arrive("a2")
        known = arrive("a3")
        arrive("a4")
        assert closed == ["a1"]
        identified({"extensions": {"fedward.caller": known}})
        assert not known.counts
        arrive("a5"), arrive("b1"), arrive("c1")
        assert closed == ["a1"]
        arrive("d1")
        assert closed == ["a1", "a2"]
        known.leave()  # once more does no harm
        gone = arrive("b2")
        assert closed == ["a1", "a2", "a4"]
        gone.leave()
        arrive("b3")
        assert closed == ["a1", "a2", "a4"]

    asyncio.run(run())


def test_a_connection_without_an_identity_ends_after_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedward.connections._GRACE_SECONDS", 0.0)

    async def run() -> None:
        table: Any = Table(ConnectionLimits(seconds=0.01))
        ended, known = asyncio.Event(), asyncio.Event()
        Unidentified(table, "a", ended.set)
        Unidentified(table, "a", known.set).leave()
        await asyncio.wait_for(ended.wait(), 30)
        assert not known.is_set()

    asyncio.run(run())
