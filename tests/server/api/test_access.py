"""Who may call, how often, and what is written down of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError

from fedward_server.api.access import Rate
from tools.docs.api import description

Make = Callable[..., Any]
ROLES = ("viewer", "coordinator", "admin")
CALLS = [
    (method.upper(), path, call["x-role"])
    for path, calls in description()["paths"].items()
    for method, call in calls.items()
    if "x-role" in call
]


def test_every_call_wants_a_token_and_its_role(api: Any) -> None:
    assert len(CALLS) > 15
    for method, path, role in CALLS:
        place = path.replace("{study}", "none").replace("{name}", "none").replace("{wish}", "pause")
        answer = api.call(method, place, role="")
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        for lower in ROLES[: ROLES.index(role)]:
            denied = api.call(method, place, role=lower)
            assert denied.status_code == 403, path
            told = denied.json()
            assert told["error"] == "AccessError" and told["exit_code"] == 24
            assert role in told["rule"]
        assert api.call(method, place, role=role).status_code not in (401, 403), path


@pytest.mark.parametrize("given", ["", "Bearer", "Basic eDp5", "Bearer fw_none_AAAA", "Bearer x"])
def test_what_is_no_token_opens_nothing(api: Any, given: str) -> None:
    answer = api.client.get("/v1/studies", headers={"Authorization": given})
    assert answer.status_code == 401


def test_a_revoked_token_ends_at_once(api: Any) -> None:
    made = api.call("POST", "/v1/tokens", json={"name": "eve", "role": "viewer"})
    assert made.status_code == 201
    api.tokens["eve"] = made.json()["text"]
    assert api.call("GET", "/v1/studies", role="eve").status_code == 200
    assert api.call("DELETE", "/v1/tokens/eve").json()["revoked"]
    assert api.call("GET", "/v1/studies", role="eve").status_code == 401


def test_no_token_lies_on_the_disk_or_in_the_list(api: Any) -> None:
    listed = api.call("GET", "/v1/tokens")
    api.registry.close()
    stored = b"".join(p.read_bytes() for p in api.config.server.state.glob("registry.db*"))
    for text in api.tokens.values():
        secret = text.split("_", 2)[2]  # the secret may have underscores of its own
        assert len(secret) > 20
        assert secret.encode() not in stored
        assert secret not in listed.text


def test_a_role_that_is_not_one_makes_no_token(api: Any) -> None:
    answer = api.call("POST", "/v1/tokens", json={"name": "x", "role": "root"})
    assert answer.status_code == 422
    assert answer.json()["where"] == "body.role"


def test_a_rate_counts_a_minute() -> None:
    now = [0.0]
    rate = Rate(2, lambda: now[0])
    for expected in (False, False, True):
        assert rate.full("a") is expected
        rate.add("a")
    assert not rate.full("b")
    now[0] = 61.0
    assert not rate.full("a")


def test_a_token_has_its_calls_per_minute_and_others_theirs(make_api: Make) -> None:
    api = make_api(requests_per_minute=3)
    answers = [api.call("GET", "/v1/studies", role="viewer").status_code for _ in range(4)]
    assert answers == [200, 200, 200, 429]
    assert api.call("GET", "/v1/studies", role="admin").status_code == 200


def guess(api: Any, text: str, address: str = "192.0.2.1") -> int:
    """The status for a token's text from an address."""

    async def send() -> int:
        way = httpx.ASGITransport(api.client._app, client=(address, 1))
        async with httpx.AsyncClient(transport=way, base_url="http://aggregator") as client:
            headers = {"Authorization": f"Bearer {text}"}
            return (await client.get("/v1/sites", headers=headers)).status_code

    return asyncio.run(send())


def test_guesses_are_held_up_by_prefix_and_network_and_a_valid_token_never(
    make_api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedward_server.api.access._SLOW_SECONDS", 0.0)
    api = make_api(failures_per_minute=2)
    valid = api.tokens["viewer"]
    beside = valid[: valid.rindex(valid.split("_", 2)[2])] + "A" * 43
    assert [guess(api, f"fw_{n:010x}_{'A' * 43}") for n in range(4)] == [401, 401, 429, 429]
    assert [guess(api, "x"), guess(api, ""), guess(api, valid)] == [429, 429, 200]
    # A prefix that a valid token has shown counts by itself; elsewhere nothing was counted.
    assert [guess(api, beside) for _ in range(3)] == [401, 401, 429]
    assert [guess(api, beside, "192.0.2.2"), guess(api, "x", "192.0.2.2")] == [401, 401]
    # One host has all addresses of a /64.
    assert [guess(api, "x", f"2001:db8::{n}") for n in range(3)] == [401, 401, 429]
    assert guess(api, valid) == guess(api, api.tokens["admin"]) == 200


def test_a_rate_keeps_a_bounded_number_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedward_server.api.access._MOST_KEYS", 3)
    rate = Rate(1, lambda: 0.0)
    for key in "abcd":
        rate.add(key)
    assert [rate.full(key) for key in "abcd"] == [False, True, True, True]


def test_calls_without_a_token_are_one_entry_of_a_network(make_api: Make) -> None:
    api = make_api(failures_per_minute=100)
    for number in range(5):
        assert guess(api, "x", f"192.0.2.{number}") == 401
    api.call("POST", "/v1/" + "x" * 3000, role="")
    assert api.registry.audit.list() == []
    api.registry.audit.write_unknown()
    api.registry.audit.write_unknown()
    (entry,) = api.registry.audit.list()
    assert (entry.actor, entry.role, entry.status) == ("", "", 401)
    assert entry.action == "6 calls without a valid token"
    assert entry.address == "2 networks"  # 192.0.2.0/24, and 127.0.0.1
    assert guess(api, "x", "198.51.100.7") == 401
    api.registry.audit.write_unknown()
    assert api.registry.audit.list()[0].address == "198.51.100.0/24"


def test_what_was_counted_while_the_database_is_away_is_written_later(
    make_api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = make_api()
    guess(api, "x")

    def away(**_: Any) -> None:
        raise OperationalError("INSERT", {}, Exception("disk full"))

    with monkeypatch.context() as patched:
        patched.setattr(api.registry.audit, "add", away)
        api.registry.audit.write_unknown()
        # Nor is a change told as done whose entry is lost.
        assert (
            api.call("POST", "/v1/tokens", json={"name": "e", "role": "viewer"}).status_code == 503
        )
    assert api.registry.audit.list() == []
    api.registry.audit.write_unknown()
    assert api.registry.audit.list()[0].action == "1 calls without a valid token"


def test_what_may_change_something_is_written_down_and_nothing_else(
    api: Any, site_key: Callable[[], str]
) -> None:
    api.call("GET", "/v1/sites", role="viewer")
    api.call("POST", "/v1/sites", role="viewer", json={"name": "x", "public_key": "y"})
    api.call("POST", "/v1/sites", role="", json={"name": "x", "public_key": "y"})
    api.call("POST", "/v1/sites", json={"name": "north", "public_key": site_key()})
    told = api.call("GET", "/v1/audit").json()
    found = [(one["actor"], one["role"], one["action"], one["status"]) for one in told]
    assert found == [
        ("the admin", "admin", "POST /v1/sites", 201),
        ("the viewer", "viewer", "POST /v1/sites", 403),
    ]
    assert len(api.call("GET", "/v1/audit?limit=1").json()) == 1


def test_a_body_is_bounded_and_says_how_long_it_is(make_api: Make) -> None:
    api = make_api(request_bytes=10_000)
    long = api.call("POST", "/v1/studies", content=b"x" * 10_001)
    assert long.status_code == 422
    assert "10000 bytes" in long.json()["rule"]

    async def pieces() -> AsyncIterator[bytes]:
        yield b"{}"

    unknown = api.call("POST", "/v1/studies", content=pieces())
    assert unknown.status_code == 422
    assert "how long" in unknown.json()["rule"]
    assert api.call("POST", "/v1/studies", content=b"{").status_code == 422
