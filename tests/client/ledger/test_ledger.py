"""The privacy ledger: nothing is released that it does not count, whatever happens."""

from __future__ import annotations

import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import warm_start
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedward.dp.accounting import Mechanism, _filter_order
from fedward.errors import BudgetError, FedwardError
from fedward_client.ledger import Charge, Ledger, Release, RoundRequest
from fedward_client.ledger.ledger import BudgetStatus, Caps, RoundBusy
from fedward_client.ledger.releases import Releases

DELTA = 1e-4
CAPS = Caps(study=3.0, cohort=4.0, delta=DELTA)
COHORTS = {"a" * 64: ["p1", "p2"], "b" * 64: ["p2", "p3"], "c" * 64: ["p4"]}
MECHANISMS = (Mechanism(2.0, 0.1, 10), Mechanism(1.5, 0.2, 5))


def independent(mechanisms: list[Mechanism], delta: float = DELTA) -> float:
    """Google's accountant over the same mechanisms."""
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for one in mechanisms:
        step = dp_event.PoissonSampledDpEvent(
            one.sampling_rate, dp_event.GaussianDpEvent(one.noise_multiplier)
        )
        accountant.compose(step, one.steps)
    return float(accountant.get_epsilon(delta)) if mechanisms else 0.0


def filtered(mechanisms: list[Mechanism], cap: float = CAPS.cohort) -> float:
    """Google's Rényi accountant, at the order that is fixed for a cap."""
    accountant = RdpAccountant([_filter_order(cap, DELTA)])
    for one in mechanisms:
        step = dp_event.PoissonSampledDpEvent(
            one.sampling_rate, dp_event.GaussianDpEvent(one.noise_multiplier)
        )
        accountant.compose(step, one.steps)
    return float(accountant.get_epsilon(DELTA)) if mechanisms else 0.0


def request(
    study: str = "s",
    round_: int = 1,
    cohort: str = "a" * 64,
    mechanism: Any = MECHANISMS[0],
    plan: str = "f" * 64,
) -> RoundRequest:
    return RoundRequest(study, plan, round_, cohort, mechanism, DELTA if mechanism else None)


def opened(folder: Path) -> Ledger:
    ledger = Ledger(folder)
    for cohort, people in COHORTS.items():
        ledger.register(cohort, "chest", people)
    return ledger


def reserve(ledger: Ledger, **more: Any) -> Charge:
    charge = ledger.reserve(request(**more), CAPS)
    assert isinstance(charge, Charge)
    return charge


def test_the_path_of_a_round(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    charge = reserve(ledger)
    with pytest.raises(RoundBusy):
        reserve(ledger)
    ledger.commit(charge, "d" * 64)
    assert ledger.reserve(request(), CAPS) == Release("d" * 64)
    with pytest.raises(BudgetError, match="once"):
        ledger.commit(charge, "e" * 64)
    reserve(ledger, round_=2)
    ledger.close()
    again = opened(tmp_path)
    with pytest.raises(BudgetError, match="stopped"):
        reserve(again, round_=2)
    ledger_epsilon = again.epsilon_of_study("s", DELTA)
    assert ledger_epsilon == pytest.approx(independent([Mechanism(2.0, 0.1, 20)]), rel=0.03)
    ledger.close()  # closed twice, which must not take the lock away
    reserve(again, round_=3)
    for early in (1, 2):
        with pytest.raises(FedwardError) if early == 2 else _nothing():
            again.reserve(request(round_=early), CAPS)
    with pytest.raises(BudgetError, match="plan"):
        reserve(again, round_=4, plan="0" * 64)
    with pytest.raises(BudgetError, match="cohort"):
        reserve(again, round_=4, cohort="c" * 64)
    (row,) = again.studies()
    assert (row["charged"], row["released"], row["lost"], row["last_round"]) == (3, 1, 1, 3)
    again.close()


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_an_unreleased_earlier_round_is_refused(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.commit(reserve(ledger, round_=5), "d" * 64)
    with pytest.raises(BudgetError, match="turn"):
        reserve(ledger, round_=4)
    ledger.close()


def test_cohorts_that_share_a_patient_share_a_budget(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    for study, cohort in (("s", "a"), ("t", "b"), ("u", "c")):
        ledger.commit(reserve(ledger, study=study, cohort=cohort * 64), "d" * 64)
    both = filtered([MECHANISMS[0], MECHANISMS[0]])
    alone = independent([MECHANISMS[0]])
    for cohort, wanted in (("a", both), ("b", both), ("c", alone)):
        spent = ledger.standing(cohort * 64, CAPS).spent
        assert wanted <= spent * 1.001
        assert spent == pytest.approx(wanted, rel=0.03)
    ledger.close()


def test_a_patient_in_the_middle_counts_not_the_chain(tmp_path: Path) -> None:
    """Nobody is in a and in c, so what both were charged adds up for no one."""
    ledger = Ledger(tmp_path)
    for cohort, people in (("a", ["1", "2"]), ("b", ["2", "3"]), ("c", ["3", "4"])):
        ledger.register(cohort * 64, "x", people)
        ledger.commit(reserve(ledger, study=cohort, cohort=cohort * 64), "d" * 64)
    spent = ledger.standing("b" * 64, CAPS).spent
    assert spent == pytest.approx(filtered([MECHANISMS[0]] * 2), rel=1e-6)
    ledger.close()


def test_what_would_exceed_a_cap_is_refused_before_it_is_charged(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    whole = Mechanism(2.0, 0.1, 4000)
    with pytest.raises(BudgetError, match="study must stay"):
        ledger.check_study(request(), whole, CAPS)
    ledger.check_study(request(), MECHANISMS[0], CAPS)
    with pytest.raises(BudgetError, match="budget"):
        ledger.reserve(request(mechanism=whole), CAPS)
    assert ledger.epsilon_of_study("s", DELTA) == 0.0
    big = Caps(study=1e3, cohort=2.0, delta=DELTA)
    with pytest.raises(BudgetError, match="cohort must stay"):
        for number in range(1, 400):
            charge = ledger.reserve(request(round_=number), big)
            assert isinstance(charge, Charge)
            ledger.commit(charge, "d" * 64)
    assert 1.5 < ledger.standing("a" * 64, big).spent <= 2.0
    ledger.close()


def test_rounds_without_privacy_are_written_down_and_cost_nothing(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    for _ in range(2):
        ledger.commit(reserve(ledger, mechanism=None), "d" * 64)
    assert ledger.standing("a" * 64, CAPS) == BudgetStatus(DELTA, 0.0, 4.0, 1, 1)
    assert ledger.standing("b" * 64, CAPS) == BudgetStatus(DELTA, 0.0, 4.0, 1, 1)  # shares p2
    assert ledger.standing("c" * 64, CAPS) == BudgetStatus(DELTA, 0.0, 4.0, 0, 0)
    row = ledger.studies()[0]
    assert (row["charged"], row["unbounded_rounds"]) == (1, 1)
    assert row["epsilon"] is row["site_epsilon"] is None
    ledger.close()


class Killed(BaseException):
    """SIGKILL, as far as the ledger can tell: nothing that follows is done."""


class Dying:
    """A connection whose process is killed at one of the statements to come."""

    def __init__(self, real: sqlite3.Connection, left: int) -> None:
        self._real, self._left = real, left

    def execute(self, *words: Any) -> sqlite3.Cursor:
        self._left -= 1
        if self._left < 0:
            raise Killed
        return self._real.execute(*words)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class LedgerMachine(RuleBasedStateMachine):
    """Crashes at any statement, repeats, several studies and clocks that jump, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.time = 0.0
        self.open: dict[tuple[str, int], tuple[Charge, Mechanism]] = {}
        self.released: dict[tuple[str, int], tuple[str, Mechanism]] = {}
        self.charged: dict[tuple[str, int], Mechanism] = {}
        self.cohort_of = {"s": "a" * 64, "t": "b" * 64, "u": "c" * 64}
        self.number = 0
        self._open()

    def _open(self) -> None:
        self.ledger = Ledger(self.folder, clock=lambda: self.time)
        for cohort, people in COHORTS.items():
            self.ledger.register(cohort, "chest", people)

    @rule(study=st.sampled_from("stu"), round_=st.integers(1, 4), which=st.integers(0, 1))
    def ask(self, study: str, round_: int, which: int) -> None:
        mechanism = MECHANISMS[which]
        try:
            got = self.ledger.reserve(
                request(study, round_, self.cohort_of[study], mechanism), CAPS
            )
        except BudgetError:
            assert self._may_refuse(study, round_, mechanism)
            return
        if isinstance(got, Release):
            assert self.released[study, round_][0] == got.digest
        else:
            assert (study, round_) not in self.released
            self.open[study, round_] = (got, mechanism)
            self.charged[study, round_] = mechanism

    def _may_refuse(self, study: str, round_: int, more: Mechanism) -> bool:
        """Whether the round was charged, is past, or would exceed a cap by the other accountant."""
        if any(one == study and number >= round_ for one, number in self.charged):
            return True
        own = [mechanism for (one, _), mechanism in self.charged.items() if one == study]
        people = COHORTS[self.cohort_of[study]]
        worst = max(_proven([*self._of(patient, self.charged), more]) for patient in people)
        alone = _proven([*own, more], CAPS.study)
        return alone > 0.97 * CAPS.study or worst > 0.97 * CAPS.cohort

    def _of(self, patient: str, rounds: dict[tuple[str, int], Mechanism]) -> list[Mechanism]:
        """The mechanisms that ran over a patient."""
        return [m for (study, _), m in rounds.items() if patient in COHORTS[self.cohort_of[study]]]

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.open)))
        charge, mechanism = self.open.pop(key)
        self.number += 1
        self.ledger.commit(charge, f"{self.number:064d}")
        self.released[key] = (f"{self.number:064d}", mechanism)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.ledger.lose(self.open.pop(data.draw(st.sampled_from(sorted(self.open))))[0])

    @rule()
    def crash(self) -> None:
        self.ledger.close()
        self.open = {}
        self._open()

    @rule(
        study=st.sampled_from("stu"),
        round_=st.integers(1, 4),
        which=st.integers(0, 1),
        left=st.integers(0, 16),
    )
    def killed_while_it_charges(self, study: str, round_: int, which: int, left: int) -> None:
        asked = request(study, round_, self.cohort_of[study], MECHANISMS[which])
        self._dies(left, lambda: self.ledger.reserve(asked, CAPS))
        if self._state_of(study, round_) is not None:
            self.charged.setdefault((study, round_), MECHANISMS[which])

    @precondition(lambda self: self.open)
    @rule(data=st.data(), left=st.integers(0, 12))
    def killed_while_it_commits(self, data: st.DataObject, left: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.open)))
        charge, mechanism = self.open[key]
        self.number += 1
        digest = f"{self.number:064d}"
        self._dies(left, lambda: self.ledger.commit(charge, digest))
        # On the disk or not: what is there is what will be given again.
        if self._state_of(*key) == "committed":
            self.released[key] = (digest, mechanism)

    def _dies(self, left: int, act: Callable[[], object]) -> None:
        """Do something in a process that is killed after so many statements; opens it anew."""
        store = self.ledger._store
        real = store._connection
        assert real is not None
        store._connection = Dying(real, left)  # type: ignore[assignment]
        with suppress(BudgetError, Killed):
            act()
        store._connection = real
        self.crash()

    def _state_of(self, study: str, round_: int) -> str | None:
        rows = self.ledger._rows(
            "SELECT state FROM charges WHERE study = ? AND round = ?", study, round_
        )
        return str(rows[0][0]) if rows else None

    @rule(by=st.floats(-1e9, 1e9))
    def clock_jumps(self, by: float) -> None:
        self.time += by

    @invariant()
    def nothing_released_is_uncounted(self) -> None:
        out = {key: mechanism for key, (_, mechanism) in self.released.items()}
        for patient in ("p1", "p2", "p3", "p4"):
            cohorts = [c for c, people in COHORTS.items() if patient in people]
            spent = max(self.ledger.standing(c, CAPS).spent for c in cohorts)
            assert _cost(self._of(patient, out)) <= spent * 1.001 + 1e-9
            assert spent <= CAPS.cohort
        for cohort, people in COHORTS.items():
            most = max(_proven(self._of(patient, self.charged)) for patient in people)
            now = self.ledger.standing(cohort, CAPS)
            assert now.spent <= most * 1.02 + 0.012
            assert now.left == 0 or now.left + most == pytest.approx(CAPS.cohort, abs=1e-6)

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.folder)


_KNOWN: dict[tuple[Any, ...], float] = {}


def _cost(mechanisms: list[Mechanism]) -> float:
    key = tuple(sorted((m.noise_multiplier, m.sampling_rate, m.steps) for m in mechanisms))
    if key not in _KNOWN:
        _KNOWN[key] = independent(mechanisms)
    return _KNOWN[key]


def _proven(mechanisms: list[Mechanism], cap: float = CAPS.cohort) -> float:
    """What holds however the mechanisms were chosen."""
    return max(_cost(mechanisms), filtered(mechanisms, cap))


LedgerMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
test_no_interleaving_releases_more_than_is_counted = LedgerMachine.TestCase


@pytest.mark.integration
@pytest.mark.parametrize("committed", [False, True])
def test_a_killed_trainer_has_spent_what_it_reserved(tmp_path: Path, committed: bool) -> None:
    code = f"""
import os, signal
from pathlib import Path
from fedward_client.ledger import Ledger, RoundRequest
from fedward_client.ledger.ledger import Caps
from fedward.dp.accounting import Mechanism, _filter_order
ledger = Ledger(Path({str(tmp_path)!r}))
ledger.register("a" * 64, "chest", ["p1"])
mechanism = Mechanism(2.0, 0.1, 10)
charge = ledger.reserve(RoundRequest("s", "f" * 64, 1, "a" * 64, mechanism, 1e-4),
                        Caps(3.0, 4.0, 1e-4))
if {committed}:
    ledger.commit(charge, "d" * 64)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = warm_start.run([sys.executable, "-c", code])
    assert done.returncode == -signal.SIGKILL
    ledger = Ledger(tmp_path)
    if committed:
        assert ledger.reserve(request(), CAPS) == Release("d" * 64)
    else:
        with pytest.raises(BudgetError, match="stopped"):
            ledger.reserve(request(), CAPS)
    assert ledger.standing("a" * 64, CAPS).spent > 0
    ledger.close()


def test_one_trainer_at_a_time_and_readers_besides(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    reserve(ledger)
    with pytest.raises(BudgetError, match="one trainer"):
        Ledger(tmp_path)
    reader = Ledger(tmp_path, read_only=True)
    assert reader.studies()[0]["charged"] == 1
    assert reader.cohorts()[0] == ("a" * 64, "chest", 2)
    reader.close()
    ledger.close()


def test_an_older_copy_and_damage_are_found(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as copy:
        copy.execute("VACUUM INTO ?", (str(tmp_path / "old"),))
    copy.close()
    ledger = opened(tmp_path)
    reserve(ledger)
    ledger.close()
    for left in tmp_path.glob("ledger.sqlite-*"):
        left.unlink()
    kept = (tmp_path / "ledger.sqlite").read_bytes()
    (tmp_path / "ledger.sqlite").write_bytes((tmp_path / "old").read_bytes())
    with pytest.raises(BudgetError, match="older"):
        Ledger(tmp_path)
    (tmp_path / "ledger.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(BudgetError, match="whole"):
        Ledger(tmp_path)
    (tmp_path / "ledger.sqlite").unlink()
    with pytest.raises(BudgetError, match="whole"):
        Ledger(tmp_path)
    (tmp_path / "ledger.sqlite").write_bytes(kept)
    Ledger(tmp_path).close()


def test_a_full_disk_charges_nothing_silently(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    size = max(path.stat().st_size for path in tmp_path.glob("ledger.sqlite*"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(BudgetError, match="writable"):
            for number in range(1, 200):
                reserve(ledger, round_=number, mechanism=Mechanism(50.0, 0.01, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    ledger.close()
    Ledger(tmp_path).close()


def test_releases_are_given_again_byte_for_byte_and_old_ones_go(tmp_path: Path) -> None:
    kept = Releases(tmp_path / "releases")
    digests = [kept.keep("s", n, bytes([n]) * 10) for n in (1, 2, 3)]
    other = kept.keep("s2", 1, b"other")
    assert kept.again("s", 3, digests[2]) == b"\x03" * 10
    assert kept.again("s2", 1, other) == b"other"
    with pytest.raises(BudgetError):
        kept.again("s", 1, digests[0])
    (tmp_path / "releases" / "s.000002").write_bytes(b"changed")
    with pytest.raises(BudgetError):
        kept.again("s", 2, digests[1])
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "releases").iterdir())
