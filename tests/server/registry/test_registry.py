from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy import text

from fedward.errors import AccessError, ConfigError, PlanError, StudyError
from fedward.plan import Plan, plan_hash
from fedward.protocol import RoundOrder, SiteFacts
from fedward.signing import encoded_public_key, fingerprint, public_bytes, verify_order
from fedward_server.registry import Registry
from fedward_server.registry.database import connect, open_database
from fedward_server.registry.records import NEXT, Study
from fedward_server.results import Round

KEY = Ed25519PrivateKey.generate()
MakePlan = Callable[..., Plan]


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    """A registry on each kind of database."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'registry.db'}"
    else:
        url = request.getfixturevalue("postgres")
        _empty(url)
    registry = Registry(open_database(url), KEY)
    yield registry
    registry.close()


def _empty(url: str) -> None:
    engine = connect(url)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()


@pytest.fixture
def study(store: Registry, make_plan: MakePlan) -> Study:
    return store.studies.submit(make_plan(), ["b", "a"])


def site_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def facts(site: str) -> SiteFacts:
    return SiteFacts(
        site=site,
        patients=9,
        images=9,
        train_patients=5,
        validation_patients=2,
        test_patients=2,
        train_images=5,
        validation_images=2,
        test_images=2,
    )


def test_a_study_reads_back_and_its_orders_are_signed(store: Registry, make_plan: MakePlan) -> None:
    plan = make_plan(study={"name": "Tiny.Study_1".lower()})
    study = store.studies.submit(plan, ["b", "a", "b"], quorum=2, deadline=9.5, seed=3)
    assert store.studies.get(study.id) == study
    assert study.read_plan() == plan and study.plan_sha256 == plan_hash(plan)
    assert (study.sites, study.quorum, study.deadline, study.seed) == (("a", "b"), 2, 9.5, 3)
    assert (study.state, study.wanted, study.round) == ("submitted", "run", 0)
    assert study.coordinator == encoded_public_key(KEY)
    order = RoundOrder(plan=study.plan, plan_hash=study.plan_sha256, round=1, study=study.id)
    signed = store.sign(order)
    assert verify_order(signed, "train", {}) == fingerprint(public_bytes(KEY))


def test_who_only_evaluates_stands_beside_those_who_train(
    store: Registry, make_plan: MakePlan
) -> None:
    study = store.studies.submit(make_plan(), ["a", "b"], evaluate_only=["d", "c", "d"])
    assert (study.sites, study.evaluate_only, study.quorum) == (("a", "b"), ("c", "d"), 1)
    assert store.studies.get(study.id) == study and store.studies.list() == [study]


def test_quorum_and_deadline_come_from_the_plan(store: Registry, make_plan: MakePlan) -> None:
    plan = make_plan(participation={"sites": 3, "deadline": 12.0})
    study = store.studies.submit(plan, ["a", "b", "c"])
    assert (study.quorum, study.deadline) == (2, 12.0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sites": ["a"]}, "needs 2 sites"),
        ({"quorum": 3}, "from 1 to the 2 sites"),
        ({"quorum": 0}, "from 1 to the 2 sites"),
        ({"deadline": 0.0}, "seconds above 0"),
        ({"deadline": float("nan")}, "seconds above 0"),
        ({"evaluate_only": ["c", "b"]}, r"trains, or only evaluates \(got b\)"),
        ({"sites": ["a"], "evaluate_only": ["b"]}, "needs 2 sites"),
    ],
)
def test_what_does_not_fit_the_plan_is_refused(
    store: Registry, make_plan: MakePlan, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        store.studies.submit(make_plan(), **{"sites": ["a", "b"], **more})
    assert store.studies.list() == []


def test_a_quorum_that_the_strategy_cannot_work_with_is_refused(
    store: Registry, make_plan: MakePlan
) -> None:
    plan = make_plan(
        strategy={"name": "krum", "settings": {"malicious": 1}},
        participation={"sites": 5, "quorum": 5},
    )
    sites = ["a", "b", "c", "d", "e"]
    with pytest.raises(PlanError, match=r"krum needs 5 updates \(got 4\)"):
        store.studies.submit(plan, sites, quorum=4)
    assert store.studies.submit(plan, sites).quorum == 5


def test_a_request_that_is_sent_twice_makes_one_study(store: Registry, make_plan: MakePlan) -> None:
    first = store.studies.submit(make_plan(), ["a", "b"], request="r-1")
    assert store.studies.submit(make_plan(), ["a", "b"], request="r-1") == first
    assert store.studies.submit(make_plan(), ["a", "b"], request="r-2") != first
    assert len(store.studies.list()) == 2


def test_a_round_counts_once_however_often_it_is_saved(store: Registry, study: Study) -> None:
    for seconds in (1.0, 1.0, 2.0):
        store.studies.save_round(study.id, Round(round=1, stage="all", seconds=seconds))
    store.studies.save_round(study.id, Round(round=2, stage="all", seconds=3.0))
    assert [(r.round, r.seconds) for r in store.studies.rounds(study.id)] == [(1, 2.0), (2, 3.0)]
    assert store.studies.get(study.id).round == 2
    told = [e.payload["round"] for e in store.studies.events_after(study.id) if e.kind == "round"]
    assert told == [1, 2]
    store.studies.save_round(study.id, Round(round=1, stage="all", seconds=1.0))
    assert store.studies.get(study.id).round == 2


def test_states_follow_the_table(store: Registry, make_plan: MakePlan) -> None:
    for before, allowed in NEXT.items():
        for after in NEXT:
            study = store.studies.submit(make_plan(), ["a", "b"])
            for step in {"submitted": (), "stopped": ("stopped",)}.get(before, ("running", before)):
                store.studies.set_state(study.id, step)
            if after == before or after in allowed:
                assert store.studies.set_state(study.id, after, "why").state == after
            else:
                with pytest.raises(StudyError, match=f"is {before} cannot become {after}"):
                    store.studies.set_state(study.id, after)


def test_an_operators_pause_holds_against_the_runner(store: Registry, study: Study) -> None:
    store.studies.set_state(study.id, "running")
    paused = store.studies.want(study.id, "pause", "anna")
    assert (paused.state, paused.reason) == ("paused", "paused by anna")
    with pytest.raises(StudyError, match="an operator wants this study to pause"):
        store.studies.set_state(study.id, "running")
    resumed = store.studies.want(study.id, "run", "anna")
    assert (resumed.state, resumed.wanted) == ("submitted", "run")
    assert store.studies.set_state(study.id, "running").state == "running"
    stopped = store.studies.want(study.id, "stop", "anna")
    assert store.studies.want(study.id, "stop", "bert") == stopped
    with pytest.raises(StudyError, match="stays so"):
        store.studies.want(study.id, "run", "anna")


def test_events_are_numbered_without_gaps_by_many_writers(store: Registry, study: Study) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.studies.add_event(study.id, "note", {"n": n}), range(40)))
    events = store.studies.events_after(study.id)
    assert [event.seq for event in events] == list(range(1, 42))
    assert {event.payload["n"] for event in events[1:]} == set(range(40))
    assert store.studies.events_after(study.id, 40) == events[40:]
    assert store.studies.events_after(study.id, 0, limit=3) == events[:3]


def test_what_is_not_there_is_told(store: Registry) -> None:
    for call in (
        lambda: store.studies.get("x"),
        lambda: store.studies.set_state("x", "running"),
        lambda: store.studies.add_event("x", "note", {}),
        lambda: store.studies.save_round("x", Round(round=1, stage="all", seconds=1.0)),
    ):
        with pytest.raises(StudyError, match="the study must exist"):
            call()
    assert store.studies.find("x") is None and store.studies.rounds("x") == []


def test_a_site_is_enrolled_rotated_and_removed(store: Registry) -> None:
    first, second = site_key(), site_key()
    site = store.sites.add("north", first, node_id=2**64 - 1, max_patients=900)
    assert store.sites.get("north") == site and site.node_id == 2**64 - 1
    store.sites.set_facts("north", facts("north"))
    assert (site.max_patients, site.max_images) == (900, None)
    store.sites.limit("north", max_images=2000)
    rotated = store.sites.rotate("north", second, node_id=7)
    assert rotated.fingerprint != site.fingerprint
    assert (rotated.state, rotated.node_id) == ("active", 7)
    assert (rotated.max_patients, rotated.max_images) == (900, 2000)
    assert store.sites.get("north").facts == facts("north")
    store.sites.remove("north")
    assert store.sites.list() == [] and store.sites.find("north") is None
    assert [one.state for one in store.sites.list(history=True)] == ["rotated", "removed"]
    for key in (first, second):
        with pytest.raises(ConfigError, match="a key is enrolled once"):
            store.sites.add("north", key)
    assert store.sites.add("north", site_key()).state == "active"


def test_a_failed_rotation_leaves_the_old_key(store: Registry) -> None:
    site = store.sites.add("north", site_key())
    store.sites.add("south", other := site_key())
    with pytest.raises(ConfigError, match="a key is enrolled once"):
        store.sites.rotate("north", other)
    assert store.sites.get("north") == site


def test_names_and_keys_are_checked(store: Registry) -> None:
    store.sites.add("north", site_key())
    with pytest.raises(ConfigError, match="name: a site's name is given once"):
        store.sites.add("north", site_key())
    for wrong in ("", "no key", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        with pytest.raises(ConfigError, match="must be a public EC key"):
            store.sites.add("south", wrong)
    for call in (store.sites.get, store.sites.remove, store.sites.limit):
        with pytest.raises(ConfigError, match="site: the site must be enrolled"):
            call("west")


def test_openssh_and_pem_are_the_same_key(store: Registry) -> None:
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_public_key,
    )

    pem = site_key()
    ssh = load_pem_public_key(pem.encode()).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    store.sites.add("north", ssh.decode())
    assert store.sites.get("north").public_key == pem
    with pytest.raises(ConfigError, match="a key is enrolled once"):
        store.sites.add("south", pem)


def test_tokens_open_until_they_are_revoked(store: Registry) -> None:
    made = store.tokens.create("anna", "coordinator")
    assert store.tokens.check(made.text) == made.token
    assert made.token.may("viewer") and not made.token.may("admin")
    wrong = made.text[:-2] + ("AA" if made.text[-2:] != "AA" else "BB")
    for text_ in ("", "x", "fw_", wrong, made.text.upper(), made.text.replace("fw_", "fx_"), "é"):
        assert store.tokens.check(text_) is None, text_
    with pytest.raises(AccessError, match="given once"):
        store.tokens.create("anna", "viewer")
    assert store.tokens.revoke("anna").revoked
    assert store.tokens.check(made.text) is None
    with pytest.raises(AccessError, match="the token must exist"):
        store.tokens.revoke("anna")
    assert store.tokens.create("anna", "viewer").token.role == "viewer"


def test_the_audit_log_gives_the_newest_first(store: Registry) -> None:
    for n in range(3):
        store.audit.add(
            actor="anna", role="admin", address="127.0.0.1", action=f"POST /{n}", status=200
        )
    assert [entry.action for entry in store.audit.list(2)] == ["POST /2", "POST /1"]


_WRITER = """
import sys
from fedward_server.registry.database import open_database
from fedward_server.registry.studies import StudyStore
from fedward_server.results import Round
store = StudyStore(open_database(sys.argv[1]), "")
print("ready", flush=True)
n = 0
while True:
    n += 1
    store.save_round(sys.argv[2], Round(round=n, stage="all", seconds=1.0))
    print(n, flush=True)
"""


@pytest.mark.integration
def test_a_killed_writer_loses_no_saved_round(tmp_path: Path, make_plan: MakePlan) -> None:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    registry = Registry(open_database(url), KEY)
    study = registry.studies.submit(make_plan(), ["a", "b"])
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, url, study.id], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if line.strip() == "20":
                writer.kill()
                break
    rounds = [one.round for one in registry.studies.rounds(study.id)]
    assert rounds == list(range(1, len(rounds) + 1)) and len(rounds) >= 20
    told = [e for e in registry.studies.events_after(study.id) if e.kind == "round"]
    assert [event.payload["round"] for event in told] == rounds
    assert registry.studies.get(study.id).round == rounds[-1]
    registry.close()


def test_quarantine_holds_in_one_study_and_is_released(
    store: Registry, make_plan: MakePlan
) -> None:
    store.sites.add("north", site_key(), 1)
    one, other = (
        store.studies.submit(make_plan(participation={"sites": 1}), ["north"]) for _ in range(2)
    )
    store.studies.quarantine(one.id, "north", "an update must be finite")
    store.studies.quarantine(one.id, "north", "an update must be near")
    assert store.studies.quarantined(one.id) == {"north": "an update must be near"}
    assert store.studies.quarantined(other.id) == {}
    assert store.studies.release("north", other.id) == []
    assert store.studies.release("north", one.id) == [one.id]
    assert store.studies.quarantined(one.id) == {}
    assert store.studies.events_after(one.id)[-1].kind == "released"
