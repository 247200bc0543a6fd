"""Who is put out of a study, and what does not save them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import ConfigRecord, Message, RecordDict

from fedward.errors import StudyError
from fedward.flower import identity
from fedward.plan.load import plan_hash
from fedward.protocol import Refusal, SiteFacts
from fedward.rule_codes import GENERAL, RuleCode
from fedward.strategies import STRATEGIES
from fedward_server.checkpoints import Checkpoints
from fedward_server.config import ServerConfig
from fedward_server.events import Event, SiteQuarantined, SiteRefused, SiteWarned, StudyStarted
from fedward_server.job import Job, SizeLimit
from fedward_server.participants import Participants
from fedward_server.registry import Registry
from fedward_server.reply_validation import InvalidReply
from fedward_server.results import Arm, Round
from fedward_server.runner import Runner

Make = Callable[..., Any]
PRIVATE = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}
INVALID = InvalidReply("an update must be finite.")
OTHERS = [
    InvalidReply("no answer in time", "silent"),
    InvalidReply("it works", "busy"),
    InvalidReply("paused", "paused"),
]


def site_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def facts(site: str, **more: Any) -> SiteFacts:
    return SiteFacts.model_validate(
        {
            "site": site,
            "patients": 20,
            "images": 40,
            "train_patients": 14,
            "validation_patients": 2,
            "test_patients": 4,
            "train_images": 28,
            "validation_images": 4,
            "test_images": 8,
            **more,
        }
    )


@pytest.fixture
def heard() -> list[Event]:
    return []


@pytest.fixture
def job(make_plan: Make, heard: list[Event]) -> Job:
    start = {"w": np.zeros(2, np.float32)}
    return Job(
        make_plan(),
        start,
        Arm(name="t", kind="federated"),
        listen=heard.append,
        members={1: "north", 2: "south"},
        facts={s: facts(s) for s in ("north", "south")},
    )


def members(job: Job) -> Participants:
    return Participants(job, cast(Any, None), lambda: ConfigRecord({}))


def quarantined(heard: list[Event]) -> list[str]:
    return [event.site for event in heard if isinstance(event, SiteQuarantined)]


@pytest.mark.parametrize("between", OTHERS, ids=lambda bad: bad.kind)
def test_neither_silence_nor_a_refusal_saves_from_quarantine(
    job: Job, heard: list[Event], between: InvalidReply
) -> None:
    ours = members(job)
    for bad in (INVALID, between, INVALID, between, INVALID):
        ours.note("north", bad)
    assert quarantined(heard) == ["north"]
    assert ours.nodes == {2: "south"}


def test_a_valid_answer_does(job: Job, heard: list[Event]) -> None:
    ours = members(job)
    for bad in (INVALID, INVALID, None, INVALID, INVALID):
        ours.note("north", bad)
    assert quarantined(heard) == []


def test_good_updates_do_not_make_up_for_bad_counts(job: Job, heard: list[Event]) -> None:
    ours = members(job)
    for _ in range(3):
        ours.note("north", None)
        ours.note("north", INVALID, "counts")
    assert quarantined(heard) == ["north"]


def test_a_new_session_and_a_new_runner_go_on_counting(
    job: Job, heard: list[Event], tmp_path: Path, make_plan: Make
) -> None:
    members(job).note("north", INVALID)
    members(job).note("north", INVALID)
    kept = Checkpoints(tmp_path, plan_hash(job.plan))
    kept.save(job)
    job.bad_answers = {}
    assert kept.restore(job)
    members(job).note("north", INVALID)
    assert quarantined(heard) == ["north"]


class Replies:
    """A grid on which each site's answer is there at once."""

    def __init__(self, *answers: Refusal | SiteFacts, online: tuple[int, ...] = (1, 2)) -> None:
        self.answers, self.online = answers, online

    def get_node_ids(self) -> list[int]:
        return list(self.online)

    def push_messages(self, messages: Any) -> list[str]:
        return [f"m{message.metadata.dst_node_id}" for message in messages]

    def pull_messages(self, message_ids: Any) -> list[Any]:
        answers = enumerate(self.answers, 1)
        return [reply(one, f"m{node}") for node, one in answers if node in self.online]


def reply(answer: Refusal | SiteFacts, asked: str) -> Any:
    key = "refusal" if isinstance(answer, Refusal) else "facts"
    content = RecordDict({key: ConfigRecord(answer.to_flat())})  # type: ignore[arg-type]
    message = Message(content, 1, "query")
    message.metadata._reply_to_message_id = asked  # type: ignore[attr-defined]
    return message


def test_who_refused_to_enrol_is_absent_with_its_own_reason(job: Job) -> None:
    job.facts, job.ask_again_seconds = {}, 60.0
    kinds: list[Any] = ["pending", "busy"]
    identity.become_server()
    grid = Replies(
        *(
            Refusal(site=s, kind=k, round=0, code=GENERAL[k])
            for s, k in zip(("north", "south"), kinds, strict=True)
        )
    )
    ours = Participants(job, cast(Any, grid), lambda: ConfigRecord({}))
    assert {bad.reason for bad in ours.absent().values()} == {"not connected"}
    ours.refresh()
    ours.refresh()
    told = {site: (bad.kind, bad.reason) for site, bad in ours.absent().items()}
    assert told == {
        "north": ("pending", f"{RuleCode.PENDING.text}."),
        "south": ("busy", f"{RuleCode.BUSY.text}."),
    }
    assert ours._refused_for_good() == 0  # both may come in yet


SPENT = Refusal(site="south", kind="budget", round=0, code=RuleCode.BUDGET)
FIRST = Round(round=1, stage="all", seconds=1.0)


def enrolling(job: Job, grid: Replies, monkeypatch: pytest.MonkeyPatch) -> Participants:
    """Members of a study between hospitals that nobody of has described itself yet."""
    identity.become_server()
    monkeypatch.setattr("fedward_server.participants._SOON", 0.0)
    job.facts, job.patient, job.ask_again_seconds = {}, True, 60.0
    return Participants(job, cast(Any, grid), lambda: ConfigRecord({}))


@pytest.mark.parametrize(
    ("members", "left_out", "online", "told"),
    [
        ({1: "north", 2: "south"}, {}, (1, 2), f"south (budget): {RuleCode.BUDGET.text}"),
        ({1: "north", 2: "south"}, {}, (1,), "south (silent): not connected"),
        (
            {1: "north"},
            {"south": InvalidReply("not enrolled any more", "silent")},
            (1,),
            "south (silent): not enrolled any more",
        ),
    ],
    ids=["budget", "offline", "not enrolled"],
)
def test_a_study_does_not_start_with_fewer_sites_than_its_plan_needs(
    job: Job,
    heard: list[Event],
    monkeypatch: pytest.MonkeyPatch,
    members: dict[int, str],
    left_out: dict[str, InvalidReply],
    online: tuple[int, ...],
    told: str,
) -> None:
    job.members, job.left_out = members, left_out
    assert job.needed == 1  # the quorum of two sites
    ours = enrolling(job, Replies(facts("north"), SPENT, online=online), monkeypatch)
    with pytest.raises(StudyError) as error:
        ours.enrol()
    assert error.value.where == "participation.sites"
    assert error.value.value == f"1 of 2; {told}"
    assert "study resume" in error.value.fix
    assert not [event for event in heard if isinstance(event, StudyStarted)]


def test_after_its_first_round_a_study_goes_on_with_its_quorum(
    job: Job, heard: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    job.arm.rounds.append(FIRST)
    ours = enrolling(job, Replies(facts("north"), SPENT), monkeypatch)
    ours.enrol()
    (started,) = [event for event in heard if isinstance(event, StudyStarted)]
    assert started.sites == ("north",)
    assert ours.least == 1


def test_who_described_itself_and_left_starts_no_study(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Replies(facts("north"), facts("south"))
    ours = enrolling(job, grid, monkeypatch)
    ours.refresh()
    ours.refresh()
    assert ours.nodes == {1: "north", 2: "south"}
    grid.online = (1,)
    with pytest.raises(StudyError, match=r"1 of 2; south \(silent\): not connected"):
        ours.enrol()


def test_who_is_put_out_or_gone_is_absent_with_the_reason(
    config: ServerConfig, registry: Registry, make_plan: Make
) -> None:
    for number, name in enumerate(("north", "south", "east", "west"), 1):
        registry.sites.add(name, site_key(), number)
    names = ["north", "south", "east"]
    study = registry.studies.submit(make_plan(participation={"sites": 1}), names)
    registry.studies.quarantine(study.id, "south", "an update must be finite.")
    other = registry.studies.submit(make_plan(participation={"sites": 1}), ["south"])
    registry.sites.remove("east")
    runner = Runner(config, registry, study)
    assert dict(runner._see_members()) == {1: "north"}
    told = {site: (bad.kind, bad.reason) for site, bad in members(runner.job).absent().items()}
    assert told == {
        "north": ("silent", "not connected"),
        "south": ("invalid", "quarantined in this study: an update must be finite."),
        "east": ("silent", "not enrolled any more"),
    }
    assert runner.results.named == sorted(names)
    assert dict(Runner(config, registry, other)._see_members()) == {2: "south"}
    assert registry.studies.release("south", other.id) == []
    assert registry.studies.release("south") == [study.id]
    assert dict(runner._see_members()) == {1: "north", 2: "south"}


def test_who_only_evaluates_is_reached_and_is_not_counted(
    config: ServerConfig, registry: Registry, make_plan: Make
) -> None:
    for number, name in enumerate(("north", "south"), 1):
        registry.sites.add(name, site_key(), number)
    plan = make_plan(participation={"sites": 1})
    runner = Runner(
        config, registry, registry.studies.submit(plan, ["north"], evaluate_only=["south"])
    )
    assert dict(runner._see_members()) == {1: "north", 2: "south"}
    ours = members(runner.job)
    assert ours.named_to_train == ["north"]
    assert list(ours.absent()) == ["north"] and set(ours.absent(training=False)) == {
        "north",
        "south",
    }
    assert (runner.results.named, runner.results.evaluate_only) == (["north"], ["south"])
    # An order that a crash interrupted was not sent to who never trains.
    runner.results.sites = [facts("north"), facts("south")]
    runner.job.plan = runner.plan = make_plan(participation={"sites": 1}, privacy=PRIVATE)
    runner._charge_what_was_open()
    assert list(runner.job.arm.privacy) == ["north"]


def test_a_claim_beyond_the_enrolled_size_is_refused_also_later(
    job: Job, heard: list[Event]
) -> None:
    job.facts, job.limits = {}, {"north": SizeLimit(20, 40), "south": SizeLimit(19, None)}
    ours = members(job)
    ours._take(1, facts("north"))
    ours._take(2, facts("south"))
    assert ours.nodes == {1: "north"}
    (told,) = [one for one in heard if isinstance(one, SiteRefused)]
    assert (told.site, told.kind) == ("south", "invalid")
    assert "not claim more patients than it was enrolled with (got 20 of 19)" in told.reason
    assert "--max-patients" in told.reason
    assert not [one for one in heard if isinstance(one, SiteWarned)]
    job.limits = {"north": SizeLimit(20, 39)}
    ours._forget_who_left()
    assert ours.nodes == {}


def test_a_size_that_nobody_enrolled_is_taken_with_a_warning(job: Job, heard: list[Event]) -> None:
    job.facts, job.limits = {}, {"north": SizeLimit(20, None)}
    ours = members(job)
    for node, name in ((1, "north"), (2, "south")):
        ours._take(node, facts(name))
    told = [one.reason for one in heard if isinstance(one, SiteWarned)]
    assert told[0].startswith("no enrolled size for north: its claim of 40 images is not checked")
    assert "its claim of 20 patients and 40 images is not checked" in told[1]


def newer_job(job: Job, make_plan: Make, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A study whose plan uses a setting of schema version 2."""
    known = STRATEGIES["fedavgm"].settings
    later = replace(known["server_momentum"], since=2)
    monkeypatch.setitem(known, "server_momentum", later)
    job.plan = make_plan(strategy={"name": "fedavgm", "settings": {"server_momentum": 0.9}})
    return job


OLD = {"release": "0.1.0", "plan_schema": 1}
UNREADABLE = Refusal(site="south", kind="schema", round=0, code=RuleCode.SCHEMA, **OLD)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "south", [UNREADABLE, facts("south", **OLD)], ids=["refuses", "describes itself"]
)
def test_a_plan_that_is_newer_than_a_site_does_not_start_and_names_site_and_key(
    job: Job,
    heard: list[Event],
    make_plan: Make,
    monkeypatch: pytest.MonkeyPatch,
    south: Refusal | SiteFacts,
) -> None:
    job = newer_job(job, make_plan, monkeypatch)
    ours = enrolling(job, Replies(facts("north", plan_schema=2), south), monkeypatch)
    with pytest.raises(StudyError) as error:
        ours.enrol()
    assert error.value.value == (
        "1 of 2; south (schema): it supports plan schema 1 (release 0.1.0), this plan needs 2 "
        "because of strategy.settings.server_momentum. Upgrade the site, or leave out "
        "strategy.settings.server_momentum"
    )
    assert "south" not in job.facts
    (told,) = [event for event in heard if isinstance(event, SiteRefused)]
    assert (told.site, told.kind) == ("south", "schema")
    # It is asked again, and joins after its upgrade.
    assert ours._refused_for_good() == 0
    ours.ask_again()
    cast(Any, ours)._everyone.answers = (facts("north"), facts("south", plan_schema=2))
    ours.refresh()
    ours.refresh()
    assert ours.nodes == {1: "north", 2: "south"}


@pytest.mark.parametrize("release", ["", "0.1.0"])
def test_a_refusal_that_is_not_about_the_version_keeps_its_own_words(
    job: Job, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    """A site may say so of any plan; this one needs nothing that schema version 1 has not."""
    odd = Refusal(site="south", kind="schema", round=0, code=RuleCode.SCHEMA, release=release)
    ours = enrolling(job, Replies(facts("north"), odd), monkeypatch)
    with pytest.raises(
        StudyError,
        match=r"south \(schema\): the plan must be one that the site.s release can read\)",
    ):
        ours.enrol()
