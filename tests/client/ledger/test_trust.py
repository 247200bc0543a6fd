"""What the ledger does not believe, and what no timing may break."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from typer.testing import CliRunner

from fedward.dp.accounting import Mechanism, _filter_order
from fedward.errors import BudgetError
from fedward_client.cli import app
from fedward_client.ledger import Charge, Ledger, Release, RoundRequest, accept_older, name_secret
from fedward_client.ledger.ledger import Caps, RoundBusy
from fedward_client.ledger.releases import Releases
from fedward_client.secret import site_secret

DELTA = 1e-4
CAPS = Caps(study=50.0, cohort=50.0, delta=DELTA)
ONE = Mechanism(2.0, 0.1, 10)
COHORT = "a" * 64


def independent(*mechanisms: Mechanism) -> float:
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for one in mechanisms:
        event = PoissonSampledDpEvent(one.sampling_rate, GaussianDpEvent(one.noise_multiplier))
        accountant.compose(event, one.steps)
    return float(accountant.get_epsilon(DELTA))


def filtered(*mechanisms: Mechanism, cap: float = CAPS.cohort) -> float:
    """Google's Rényi accountant, at the order that is fixed for a cap."""
    accountant = RdpAccountant([_filter_order(cap, DELTA)])
    for one in mechanisms:
        event = PoissonSampledDpEvent(one.sampling_rate, GaussianDpEvent(one.noise_multiplier))
        accountant.compose(event, one.steps)
    return float(accountant.get_epsilon(DELTA))


def cap_for(studies: int) -> float:
    """A cap under which so many studies fit, and no more; the order follows the cap."""
    cap = 2.0
    for _ in range(20):
        cap = (filtered(*[ONE] * studies, cap=cap) + filtered(*[ONE] * (studies + 1), cap=cap)) / 2
    return cap


def opened(folder: Path, **more: Any) -> Ledger:
    ledger = Ledger(folder, **more)
    ledger.register(COHORT, "chest", ["p1", "p2"])
    return ledger


def reserve(ledger: Ledger, round_: int = 1, study: str = "s", **more: Any) -> Charge:
    charge = ask(ledger, round_, study, **more)
    assert isinstance(charge, Charge)
    return charge


def ask(
    ledger: Ledger,
    round_: int = 1,
    study: str = "s",
    mechanism: Mechanism | None = ONE,
    cohort: str = COHORT,
    caps: Caps = CAPS,
) -> Charge | Release:
    return ledger.reserve(RoundRequest(study, "f" * 64, round_, cohort, mechanism, DELTA), caps)


@pytest.fixture
def charged(tmp_path: Path) -> Path:
    """The folder of a ledger with two charges, closed."""
    ledger = opened(tmp_path)
    for number in (1, 2):
        ledger.commit(reserve(ledger, number), "d" * 64)
    ledger.close()
    return tmp_path


def edit(folder: Path, *statements: str) -> None:
    """What somebody with the file and patience can do."""
    with sqlite3.connect(folder / "ledger.sqlite") as sql:
        for name in ("charges_hold", "charges_stay", "members_stay", "cohorts_stay"):
            sql.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            sql.execute(statement)
    sql.close()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a charge is gone": lambda folder: edit(folder, "DELETE FROM charges WHERE round = 2"),
    "more noise": lambda folder: edit(folder, "UPDATE charges SET noise = 900.0"),
    "fewer steps": lambda folder: edit(folder, "UPDATE charges SET steps = 1"),
    "a patient is gone": lambda folder: edit(folder, "DELETE FROM members WHERE patient = 'p1'"),
    "no anchor": lambda folder: (folder / "ledger.anchor").unlink(),
    "an anchor of nothing": lambda folder: (folder / "ledger.anchor").write_text("{}"),
    "no database": lambda folder: (folder / "ledger.sqlite").unlink(),
    "an empty database": lambda folder: (folder / "ledger.sqlite").write_bytes(b""),
    "half a database": lambda folder: os.truncate(folder / "ledger.sqlite", 9000),
    "zeros": lambda folder: zero(folder / "ledger.sqlite"),
}


def zero(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(path.stat().st_size - 4096))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_refused_and_nothing_is_made_anew(
    charged: Path, damage: Callable[[Path], object]
) -> None:
    damage(charged)
    before = {path.name: path.read_bytes() for path in charged.glob("ledger.[as]*")}
    with pytest.raises(BudgetError, match="must be whole") as refused:
        Ledger(charged)
    assert "Restore the newest copy" in str(refused.value)
    after = {path.name: path.read_bytes() for path in charged.glob("ledger.[as]*")}
    for name in ("ledger.sqlite", "ledger.anchor"):
        assert after.get(name) == before.get(name)


def test_another_ledgers_anchor_is_refused(charged: Path) -> None:
    opened(charged / "other").close()
    shutil.copy(charged / "other" / "ledger.anchor", charged / "ledger.anchor")
    with pytest.raises(BudgetError, match="another ledger's"):
        Ledger(charged)


def test_charges_neither_go_nor_change(charged: Path) -> None:
    sql = sqlite3.connect(charged / "ledger.sqlite")
    for statement in (
        "DELETE FROM charges",
        "DELETE FROM members",
        "DELETE FROM studies",
        "UPDATE charges SET steps = 1",
        "UPDATE charges SET state = 'reserved'",
        "UPDATE charges SET noise = 9.0",
    ):
        with pytest.raises(sqlite3.IntegrityError):
            sql.execute(statement)
    sql.close()


def test_killed_before_the_anchor_was_written_it_opens(charged: Path) -> None:
    before = (charged / "ledger.anchor").read_bytes()
    ledger = opened(charged)
    reserve(ledger, 3)
    ledger.close()
    (charged / "ledger.anchor").write_bytes(before)
    ledger = opened(charged)
    with pytest.raises(BudgetError, match="stopped"):
        ask(ledger, 3)
    ledger.close()


def test_an_older_copy_is_used_only_on_the_officers_word(charged: Path) -> None:
    old = (charged / "ledger.sqlite").read_bytes()
    ledger = opened(charged)
    ledger.commit(reserve(ledger, 3), "d" * 64)
    assert ledger.accepted() == 0
    ledger.close()
    (charged / "ledger.sqlite").write_bytes(old)
    with pytest.raises(BudgetError, match="older"):
        Ledger(charged)
    with pytest.raises(BudgetError, match="secret"):
        accept_older(charged, "another")
    accept_older(charged, "")
    ledger = opened(charged)
    assert (ledger.accepted(), ledger.studies()[0]["charged"]) == (1, 2)
    with pytest.raises(BudgetError, match="one trainer"):
        accept_older(charged, "")
    ledger.close()
    (charged / "ledger.sqlite").unlink()
    with pytest.raises(BudgetError, match="whole"):
        accept_older(charged, "")
    assert not (charged / "ledger.sqlite").exists()


def test_the_officer_gives_that_word_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(
        'version = 1\n[site]\nname = "n"\nstate = "state"\n[datasets.d]\nroot = "d"\n'
        'task = "classification"\nclasses = ["no", "yes"]\n'
    )
    name = name_secret(site_secret(tmp_path / "state"))
    opened(tmp_path / "state", secret_id=name).close()
    (tmp_path / "state" / "ledger.anchor").unlink()
    with pytest.raises(BudgetError, match="anchor is gone"):
        Ledger(tmp_path / "state", secret_id=name)
    command = ["budget", "--config", str(tmp_path / "site.toml"), "--accept-older-ledger"]
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, done.output) == (0, "The ledger is used as it is, and says so.\n")
    ledger = Ledger(tmp_path / "state", secret_id=name)
    assert ledger.accepted() == 1
    ledger.close()


def test_with_another_secret_patients_would_look_new(tmp_path: Path) -> None:
    name = name_secret(b"1" * 32)
    opened(tmp_path, secret_id=name).close()
    opened(tmp_path, secret_id=name).close()
    with pytest.raises(BudgetError, match=r"site\.secret"):
        Ledger(tmp_path, secret_id=name_secret(b"2" * 32))
    Ledger(tmp_path, read_only=True).close()


def test_only_the_owner_reads_it(charged: Path) -> None:
    (charged / "ledger.sqlite").chmod(0o644)
    ledger = opened(charged)
    reserve(ledger, 3)
    assert all(path.stat().st_mode & 0o077 == 0 for path in charged.glob("ledger*"))
    ledger.close()


def test_a_charge_that_could_not_be_anchored_is_spent_and_not_busy(charged: Path) -> None:
    ledger = opened(charged)
    anchor = charged / "ledger.anchor"
    kept = anchor.read_bytes()
    anchor.unlink()
    anchor.mkdir()
    with pytest.raises(BudgetError, match="writable"):
        ask(ledger, 3)
    assert ledger.epsilon_of_study("s", DELTA) >= independent(*[ONE] * 3) - 0.001
    anchor.rmdir()
    anchor.write_bytes(kept)
    with pytest.raises(BudgetError, match="spent"):
        ask(ledger, 3)
    reserve(ledger, 4)
    ledger.close()
    opened(charged).close()


def test_a_commit_that_could_not_be_anchored_releases_once(charged: Path) -> None:
    ledger = opened(charged)
    charge = reserve(ledger, 3)
    anchor = charged / "ledger.anchor"
    kept = anchor.read_bytes()
    anchor.unlink()
    anchor.mkdir()
    with pytest.raises(BudgetError, match="writable"):
        ledger.commit(charge, "e" * 64)
    with pytest.raises(BudgetError, match="writable"):
        ledger.lose(charge)
    anchor.rmdir()
    anchor.write_bytes(kept)
    assert ask(ledger, 3) == Release("e" * 64)
    ledger.close()


def test_a_failure_that_cannot_be_written_down_leaves_no_busy_round(charged: Path) -> None:
    ledger = opened(charged)
    charge = reserve(ledger, 3)
    blocker = sqlite3.connect(charged / "ledger.sqlite", isolation_level=None)
    ledger._store.connection.execute("PRAGMA busy_timeout = 1")
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(BudgetError, match="writable"):
        ledger.lose(charge)
    blocker.execute("ROLLBACK")
    blocker.close()
    with pytest.raises(BudgetError, match="spent"):
        ask(ledger, 3)
    reserve(ledger, 4)
    ledger.close()


def test_cohorts_keep_their_patients(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.register(COHORT, "chest", ["p2", "p1", "p1"])
    with pytest.raises(BudgetError, match="keeps the patients"):
        ledger.register(COHORT, "chest", ["p1", "p3"])
    with pytest.raises(BudgetError, match="has patients"):
        ledger.register("b" * 64, "chest", [])
    ledger.close()


def test_a_dataset_frozen_again_shares_the_budget(tmp_path: Path) -> None:
    """Five times a few more patients come, and the first goes: those who stay pay for all."""
    ledger = Ledger(tmp_path)
    for number in range(5):
        cohort = f"{number:064d}"
        ledger.register(cohort, "chest", [f"p{n}" for n in range(number, number + 4)])
        ledger.commit(reserve(ledger, study=f"s{number}", cohort=cohort), "d" * 64)
    last = ledger.standing(f"{4:064d}", CAPS).spent
    assert last == pytest.approx(filtered(*[ONE] * 4), rel=1e-6)  # nobody is in all five
    tight = Caps(study=50.0, cohort=cap_for(4), delta=DELTA)
    with pytest.raises(BudgetError, match="cohort must stay"):
        ask(ledger, study="next", cohort=f"{4:064d}", caps=tight)
    ledger.register("f" * 64, "chest", ["somebody else"])
    reserve(ledger, study="next", cohort="f" * 64, caps=tight)
    ledger.close()


def test_a_private_round_does_not_become_an_open_one(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.commit(reserve(ledger), "d" * 64)
    with pytest.raises(BudgetError, match="stays private"):
        ask(ledger, mechanism=None)
    assert ask(ledger) == Release("d" * 64)
    ledger.close()


def test_of_many_threads_one_trains_a_round_and_no_cap_is_passed(tmp_path: Path) -> None:
    ledger, got = opened(tmp_path), []
    tight = Caps(study=50.0, cohort=cap_for(6), delta=DELTA)
    start = threading.Barrier(12)

    def race(study: str) -> None:
        start.wait()
        try:
            got.append((study, ask(ledger, study=study, caps=tight)))
        except BudgetError as error:
            got.append((study, error))

    threads = [threading.Thread(target=race, args=(f"s{n // 2}",)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(one, Charge) for _, one in got) == 6
    assert sum(isinstance(one, RoundBusy) for _, one in got) == 6
    assert {study for study, one in got if isinstance(one, Charge)} == {f"s{n}" for n in range(6)}
    with pytest.raises(BudgetError, match="cohort must stay"):
        ask(ledger, study="late", caps=tight)
    ledger.close()


@pytest.mark.integration
def test_of_two_processes_one_has_the_ledger(tmp_path: Path) -> None:
    """Both start at once, ten times; each time one charges the next round and is killed."""
    for number in range(1, 11):
        go_read, go = os.pipe()
        said, say = os.pipe()
        act = partial(contend, tmp_path, number, go_read, say)
        children = [fork(act), fork(act)]
        os.close(go_read)
        os.close(say)
        os.write(go, b"..")
        words = b""
        while len(words) < 2:
            words += os.read(said, 2)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(go)
        os.close(said)
        assert sorted(words.decode()) == ["c", "r"]
    ledger = opened(tmp_path)
    (row,) = ledger.studies()
    assert (row["charged"], row["lost"]) == (10, 10)
    ledger.close()


def contend(folder: Path, number: int, go: int, say: int) -> None:
    os.read(go, 1)
    try:
        ledger = opened(folder)
        reserve(ledger, number, mechanism=Mechanism(50.0, 0.01, 1))
        os.write(say, b"c")
    except BudgetError:
        os.write(say, b"r")
    signal.pause()


def fork(act: Callable[[], object]) -> int:
    """A child that never comes back into the tests."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(3)
    return child


@pytest.mark.integration
def test_killed_at_any_moment_nothing_that_left_is_forgotten(tmp_path: Path) -> None:
    """Twelve trainers in a row are killed, each a little later in its work than the last."""
    sent: dict[int, bytes] = {}
    for kill in range(12):
        out, into = os.pipe()
        child = fork(partial(work, tmp_path, into))
        os.close(into)
        with os.fdopen(out, "rb") as pipe:
            seen = [pipe.readline() for _ in range(1 + kill % 3)]
            threading.Event().wait(kill % 5 / 400)  # where in its work it dies
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            lines = [*seen, *pipe.read().splitlines()]
        for line in filter(None, lines):
            number, _, update = line.strip().partition(b" ")
            sent[int(number)] = update
        check(tmp_path, sent)
    assert len(sent) >= 12


def work(folder: Path, into: int) -> None:
    """Rounds without end, as a trainer does them; what is written to the pipe has left."""
    ledger, kept = opened(folder), Releases(folder / "releases")
    first = (ledger.studies() or [{"last_round": 0}])[0]["last_round"] + 1
    for number in range(first, first + 10_000):
        charge = reserve(ledger, number, mechanism=Mechanism(40.0, 0.01, 1))
        update = os.urandom(12).hex().encode()
        ledger.commit(charge, kept.keep("s", number, update))
        os.write(into, b"%d %s\n" % (number, update))


def check(folder: Path, sent: dict[int, bytes]) -> None:
    ledger, kept = opened(folder), Releases(folder / "releases")
    assert not list((folder / "releases").glob(".*"))
    (row,) = ledger.studies()
    assert row["released"] >= len(sent)
    assert row["charged"] == row["released"] + row["lost"] == row["last_round"]
    assert row["lost"] <= 12
    for number, update in sent.items():
        release = ask(ledger, number, mechanism=Mechanism(40.0, 0.01, 1))
        assert isinstance(release, Release)
        if number >= row["last_round"] - 1:
            assert kept.again("s", number, release.digest) == update
    ledger.close()
