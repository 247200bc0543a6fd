"""Which accountant holds when, at which δ, and what an older ledger becomes."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from fedward.dp.accounting import Mechanism, epsilon_composed, epsilon_filtered
from fedward.errors import BudgetError
from fedward_client.ledger import Caps, Charge, Ledger, RoundRequest
from fedward_client.ledger.store import Store

DELTA = 1e-4
CAPS = Caps(8.0, 8.0, DELTA)
COHORT = "a" * 64
STEPS = 30
ROUND = Mechanism(
    3.42, 0.5, STEPS
)  # 5 of them are ε = 8 by the tight accountant, 8.7 by the filter
WHOLE = Mechanism(3.42, 0.5, 5 * STEPS)
SMALL = Mechanism(20.0, 0.1, 10)


def opened(folder: Path, patients: int = 2) -> Ledger:
    ledger = Ledger(folder)
    ledger.register(COHORT, "chest", [f"p{n}" for n in range(patients)])
    return ledger


def train(
    ledger: Ledger,
    study: str,
    round_: int,
    one: Mechanism | None,
    planned: int = 0,
    caps: Caps = CAPS,
    cohort: str = COHORT,
) -> None:
    charge = ledger.reserve(
        RoundRequest(study, "f" * 64, round_, cohort, one, DELTA, planned), caps
    )
    assert isinstance(charge, Charge)
    ledger.commit(charge, "d" * 64)


def test_a_study_that_fills_the_cap_is_alone_also_where_it_stops_early(tmp_path: Path) -> None:
    assert epsilon_composed([WHOLE], DELTA) <= 8.0 < epsilon_filtered([WHOLE], DELTA, 8.0)
    ledger = opened(tmp_path)
    train(ledger, "first", 1, ROUND, WHOLE.steps)
    assert ledger.standing(COHORT, CAPS).left == 0.0
    with pytest.raises(BudgetError, match="cohort must stay"):
        train(ledger, "second", 1, SMALL)
    for number in range(2, 6):
        train(ledger, "first", number, ROUND, WHOLE.steps)
    assert ledger.standing(COHORT, CAPS).spent == epsilon_composed([WHOLE], DELTA)
    # A cap that the whole first study keeps by the filter lets others follow.
    more = Caps(8.0, 9.5, DELTA)
    train(ledger, "second", 1, SMALL, caps=more)
    assert 8.7 < ledger.standing(COHORT, more).spent <= 9.5
    ledger.close()


def test_after_a_study_that_leaves_room_the_filter_counts_what_was_charged(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    train(ledger, "first", 1, SMALL, 10)
    alone = ledger.standing(COHORT, CAPS)
    assert alone.spent == epsilon_composed([SMALL], DELTA)
    train(ledger, "second", 1, SMALL, 10)
    both = ledger.standing(COHORT, CAPS)
    assert both.spent == epsilon_filtered([SMALL, SMALL], DELTA, 8.0)
    assert both.spent + both.left == pytest.approx(8.0)
    ledger.close()


def test_caps_are_held_at_one_delta_that_follows_the_largest_cohort(tmp_path: Path) -> None:
    ledger = opened(tmp_path, 100)
    assert ledger.delta_of(COHORT, None) == 1e-3
    assert ledger.delta_of(COHORT, 1e-2) == 1e-2  # the policy says so in so many words
    ledger.register("b" * 64, "chest", [f"p{n}" for n in range(99, 1200)])
    ledger.register("c" * 64, "chest", ["somebody else"])
    assert [ledger.delta_of(one * 64, None) for one in "abc"] == [1e-5, 1e-5, 1e-3]
    train(ledger, "s", 1, ROUND, caps=Caps(8.0, 8.0, None))
    (row,) = ledger.studies()
    assert (row["delta"], row["site_delta"]) == (DELTA, 1e-5)
    assert row["site_epsilon"] == epsilon_composed([ROUND], 1e-5) > row["epsilon"]
    study = Caps(row["epsilon"], 8.0, None)
    with pytest.raises(BudgetError, match=r"study must stay.* at δ 1e-05"):
        train(ledger, "t", 1, ROUND, caps=study)
    ledger.close()


def test_training_without_privacy_is_never_a_cost_of_nothing(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    train(ledger, "private", 1, SMALL)
    for number in (1, 2, 2):
        train(ledger, "open", number, None)
    train(ledger, "more", 1, None)
    now = ledger.standing(COHORT, CAPS)
    assert (now.unbounded_studies, now.unbounded_rounds) == (2, 3)
    assert now.spent == epsilon_composed([SMALL], DELTA)
    ledger.close()


def first_version(folder: Path) -> None:
    """Take a ledger back to what the first release wrote."""
    for path in folder.glob("ledger.sqlite-*"):
        path.unlink()
    sql = sqlite3.connect(folder / "ledger.sqlite")
    sql.execute("ALTER TABLE studies DROP COLUMN planned")
    sql.execute("DROP TABLE answers")
    sql.execute("DROP TABLE evaluations")
    sql.execute("PRAGMA user_version = 2")
    sql.close()
    (folder / "ledger.anchor").unlink()
    store = object.__new__(Store)
    store._connection = sqlite3.connect(folder / "ledger.sqlite")
    (folder / "ledger.anchor").write_bytes(store._state().to_bytes())
    store._connection.close()


@pytest.mark.parametrize("changed", [False, True], ids=["whole", "edited"])
def test_an_older_ledger_is_checked_and_then_brought_up(tmp_path: Path, changed: bool) -> None:
    ledger = opened(tmp_path)
    train(ledger, "s", 1, ROUND, WHOLE.steps)
    ledger.close()
    first_version(tmp_path)
    with pytest.raises(BudgetError, match="another version"):
        Ledger(tmp_path, read_only=True)
    if changed:
        sql = sqlite3.connect(tmp_path / "ledger.sqlite")
        sql.executescript("DROP TRIGGER charges_hold; UPDATE charges SET steps = 1")
        sql.close()
        with pytest.raises(BudgetError, match="an entry was changed"):
            opened(tmp_path)
        return
    for _ in range(2):
        ledger = opened(tmp_path)
        assert ledger.standing(COHORT, CAPS).spent == epsilon_composed([ROUND], DELTA)
        ledger.close()
    ledger = opened(tmp_path)
    train(ledger, "s", 2, ROUND, WHOLE.steps)
    ledger.close()
    Ledger(tmp_path, read_only=True).close()
