"""A site call that breaks off half-way: nothing is lost for good, and what is left is tidied up."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from fedward.errors import StudyError
from fedward.flower.control_client import Node, stored_key
from fedward_server.enrolment import Enrolment

Key = Callable[[], str]


def add(api: Any, name: str, key: str) -> Any:
    return api.call("POST", "/v1/sites", json={"name": name, "public_key": key})


def rotate(api: Any, name: str, key: str) -> Any:
    return api.call("POST", f"/v1/sites/{name}/rotate", json={"public_key": key})


def test_a_site_whose_enrolment_failed_is_enrolled_with_the_same_key(
    api: Any, site_key: Key
) -> None:
    key = site_key()
    api.link.broken = True
    assert add(api, "north", key).status_code == 409
    assert api.registry.sites.list(history=True) == []
    api.link.broken = False
    assert add(api, "north", key).status_code == 201


def test_a_key_that_the_superlink_took_before_an_answer_was_lost_is_taken_up(
    api: Any, site_key: Key
) -> None:
    key = site_key()
    node = api.link.register(key.encode(), "north")
    assert add(api, "north", key).status_code == 201
    assert api.registry.sites.get("north").node_id == node


def test_a_rotation_that_failed_changed_nothing_and_is_done_again(api: Any, site_key: Key) -> None:
    old, new = site_key(), site_key()
    add(api, "north", old)
    before = api.registry.sites.get("north")
    api.link.broken = True
    assert rotate(api, "north", new).status_code == 409
    assert api.registry.sites.get("north") == before
    api.link.broken = False
    assert rotate(api, "north", new).status_code == 200
    assert [one.public_key for one in api.link.known.values()] == [stored_key(new.encode())]


def test_a_rotation_to_a_key_that_was_there_before_reaches_no_superlink(
    api: Any, site_key: Key
) -> None:
    key = site_key()
    add(api, "north", key)
    add(api, "south", site_key())
    known = dict(api.link.known)
    assert rotate(api, "south", key).json()["rule"] == "a key is enrolled once"
    assert rotate(api, "east", site_key()).status_code == 409
    assert api.link.known == known


def test_a_removal_counts_where_the_superlink_is_down_or_knows_no_such_node(
    api: Any, site_key: Key
) -> None:
    for name in ("north", "south"):
        add(api, name, site_key())
    api.link.known.pop(api.registry.sites.get("north").node_id)
    assert api.call("DELETE", "/v1/sites/north").status_code == 200
    api.link.broken = True
    assert api.call("DELETE", "/v1/sites/south").status_code == 200
    assert api.registry.sites.list() == []
    api.link.broken = False
    api.enrolment.reconcile()
    assert api.link.known == {}


def test_what_a_killed_removal_left_is_ended_at_the_next_start(api: Any, site_key: Key) -> None:
    add(api, "north", site_key())
    api.registry.sites.remove("north")  # killed before the SuperLink was told
    Enrolment(api.registry, api.link).reconcile()
    assert api.link.known == {}


def test_one_site_that_the_superlink_refuses_does_not_stop_the_others(
    api: Any, site_key: Key, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("north", "south"):
        add(api, name, site_key())
    api.link.known.clear()
    api.link.ever = {stored_key(api.registry.sites.get("north").public_key.encode())}
    with caplog.at_level(logging.WARNING, "fedward.server"):
        for _ in range(2):
            with pytest.raises(StudyError, match="registry's sites"):
                api.enrolment.reconcile()
    assert api.registry.sites.get("south").node_id in api.link.known
    assert len([one for one in caplog.messages if "north" in one]) == 1


def test_a_killed_rotation_is_done_again_after_a_restart(api: Any, site_key: Key) -> None:
    add(api, "north", site_key())
    new = site_key()
    node = api.link.register(new.encode(), "north")  # killed before the registry was told
    Enrolment(api.registry, api.link).reconcile()
    assert rotate(api, "north", new).status_code == 200
    assert list(api.link.known) == [node]


def test_what_is_left_is_tidied_up_when_the_superlink_is_back(
    api: Any, site_key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedward_server.enrolment._AGAIN", 0.02)
    add(api, "north", site_key())
    api.link.broken = True
    stop = threading.Event()
    thread = threading.Thread(target=api.enrolment.keep, args=(stop,))
    thread.start()
    api.call("DELETE", "/v1/sites/north")
    api.link.broken = False
    for _ in range(200):
        if not api.link.known:
            break
        stop.wait(0.02)
    stop.set()
    thread.join()
    assert api.link.known == {}


def test_an_unregistered_node_counts_for_nothing(api: Any, site_key: Key) -> None:
    add(api, "north", site_key())
    node = api.registry.sites.get("north").node_id
    api.link.known[node] = Node(node, "unregistered", "")
    api.call("DELETE", "/v1/sites/north")
    assert api.link.known[node].status == "unregistered"
