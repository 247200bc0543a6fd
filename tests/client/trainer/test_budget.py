"""What the officer reads of the budget: every ε at the δ beside it, and what no ε bounds."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from rich.console import Console

from fedward.dp.accounting import Mechanism, epsilon_composed
from fedward_client.commands.daemon import _print_budget
from fedward_client.ledger import Caps, Ledger, RoundRequest
from fedward_client.policy.settings import PolicySection
from fedward_client.trainer.admin import Admin

COHORT = "a" * 64
ONE = Mechanism(3.42, 0.5, 30)


def test_the_officer_sees_one_delta_and_what_is_unbounded(tmp_path: Path) -> None:
    ledger, policy = Ledger(tmp_path), PolicySection()
    ledger.register(COHORT, "chest", [f"p{n}" for n in range(1001)])
    caps = Caps(8.0, 8.0, policy.max_delta)
    for study, mechanism in (("private", ONE), ("open", None)):
        ledger.reserve(RoundRequest(study, "f" * 64, 1, COHORT, mechanism, 1e-4), caps)
    site = SimpleNamespace(policy=policy, site=SimpleNamespace(state=tmp_path))
    config, none = cast("Any", site), cast("Any", None)
    told = json.loads(json.dumps(Admin(config, none, none, ledger, none).do("budget", {}, "o")))
    ledger.close()
    (row,) = told["budget"]
    spent = round(epsilon_composed([ONE], 1e-5), 4)
    assert (row["delta"], row["spent"], row["cap"]) == (1e-5, spent, 8.0)
    assert 0 < row["left"] < 8.0 - spent  # a further study is held by the looser accountant
    assert row["unbounded"] == {"studies": 1, "rounds": 1}
    private, unbounded = told["studies"]
    assert (private["site_delta"], round(private["site_epsilon"], 4)) == (1e-5, spent)
    assert private["delta"] == 1e-4
    assert unbounded["epsilon"] is unbounded["site_epsilon"] is None
    assert unbounded["unbounded_rounds"] == 1

    console = Console(width=200, file=io.StringIO())
    _print_budget(console, told)
    text = cast("io.StringIO", console.file).getvalue()
    assert "unbounded: 1 rounds of 1 studies" in text
    assert f"{spent:.3g} at 1e-05" in text and "at 0.0001" in text
    assert next(line for line in text.splitlines() if " open " in line).count("unbounded") == 2
