"""Who may call, how often, and what is written down of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from server.api.access import Rate
from server.api.reference import description

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


def test_whoever_guesses_is_held_up_also_with_the_right_token(make_api: Make) -> None:
    api = make_api(failures_per_minute=2)
    for _ in range(2):
        assert api.client.get("/v1/sites", headers={"Authorization": "Bearer x"}).status_code == 401
    held = api.call("GET", "/v1/sites")
    assert held.status_code == 429
    assert held.json()["fix"] == "Wait a minute"


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
        ("the admin", "admin", "POST /v1/sites", 201), ("", "", "POST /v1/sites", 401),
        ("the viewer", "viewer", "POST /v1/sites", 403),
    ]  # fmt: skip
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
