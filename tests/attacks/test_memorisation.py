"""A curious reader of the model, and one who sees each update: what they learn of who was in.

The attackers are those of ``fedward_simulation.audit``. Each of them succeeds on a study without
privacy and fails on the same study with it; and where the noise is silently left out, the release
gate finds the promise broken.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedward.errors import ReleaseError
from fedward.models import build_model, to_arrays
from fedward.plan import Plan
from fedward_client.data.sample import PreparedSite
from fedward_client.training.private import PrivateStep
from fedward_client.training.runtime import Runtime
from fedward_server.events import ignore
from fedward_server.memorisation import Audit
from fedward_simulation.audit import inversion
from fedward_simulation.audit.audit import PICTURE, Auditor, Sizes
from fedward_simulation.audit.federation import Federation
from fedward_simulation.audit.store import Store
from fedward_simulation.audit.study import FILE, gate
from fedward_simulation.study import Options, Study

pytestmark = pytest.mark.integration
SIZE = 12
PRIVATE = {
    "mechanism": "dp-sgd",
    "epsilon": 2.0,
    "delta": 1e-4,
    "clipping_norm": 1.0,
    "sampling_rate": 0.5,
    "audit": True,
}
ONE_STEP = {"rounds": 16, "local_steps": 1, "local_epochs": None, "optimizer": "sgd"}


@pytest.fixture
def noisy_sites() -> list[PreparedSite]:
    """Two hospitals whose labels mean nothing: to fit them is to remember patients."""
    sites = []
    for place in range(2):
        rng = np.random.default_rng(place)
        split = {"train": np.arange(40), "validation": np.arange(40, 44), "test": np.arange(44, 80)}
        sites.append(
            PreparedSite(
                name=f"site-{place + 1}",
                images=rng.normal(size=(80, 1, SIZE, SIZE)).astype("f4"),
                targets=rng.integers(0, 2, 80),
                patients=np.arange(80),
                split=split,
                spacing=np.ones((80, 2), np.float32),
            )
        )
    return sites


def audited(plan: Plan, sites: list[PreparedSite], folder: Path, sizes: Sizes) -> Audit:
    """The whole audit in this process, without a study's folder around it."""
    arrays = to_arrays(build_model(plan, 0))
    federation = Federation(
        plan, arrays, Runtime(randomness="seeded"), 0, ignore, threading.Event()
    )
    store = Store(folder / "audit", {})
    return Auditor(federation, sites, 0, sizes, None, store, folder, lambda text: None).run(
        "tiny", "0" * 64
    )


def memorising(make_plan: Callable[..., Plan], **privacy: Any) -> Plan:
    """A plan that fits its training patients by heart, if it may."""
    return make_plan(
        preprocessing={"size": [SIZE, SIZE]},
        model={"channels": [16, 32]},
        training={"rounds": 12, "local_epochs": 4, "learning_rate": 0.01, "optimizer": "adam"},
        privacy=privacy or {"mechanism": "none"},
    )


def test_membership_shows_in_a_model_without_privacy_and_not_with_it(
    make_plan: Callable[..., Plan], noisy_sites: list[PreparedSite], tmp_path: Path
) -> None:
    sizes = Sizes(shadows=3, canaries=0, steps=1)
    found = {}
    for name, privacy in {"none": {}, "private": PRIVATE}.items():
        plan = memorising(make_plan, **privacy)
        found[name] = audited(plan, noisy_sites, tmp_path / name, sizes)
    auc = {
        name: {one.attack: one.auc for one in audit.memberships} for name, audit in found.items()
    }
    for attack in ("loss, delivered model", "LiRA, delivered model", "LiRA, random halves"):
        assert auc["none"][attack] > 0.75, auc
        assert auc["private"][attack] < 0.65, auc
    members = {name: audit.bounds[0] for name, audit in found.items()}
    assert members["none"].epsilon > 0.5 and members["none"].promised is None
    assert members["private"].epsilon < 0.5 and not found["private"].broken


def one_step_plan(make_plan: Callable[..., Plan], **privacy: Any) -> Plan:
    """One private step an update, as the shipped private plans have it."""
    return make_plan(
        preprocessing={"size": [SIZE, SIZE]},
        model={"channels": [8, 16]},
        training={**ONE_STEP, "learning_rate": 0.1, "batch_size": 16},
        privacy=privacy,
    )


def test_canaries_show_in_updates_without_privacy_and_not_with_it(
    make_plan: Callable[..., Plan], noisy_sites: list[PreparedSite], tmp_path: Path
) -> None:
    sizes = Sizes(shadows=0, canaries=24, steps=1)
    plain = one_step_plan(make_plan, mechanism="none")
    private = one_step_plan(make_plan, **PRIVATE)
    found = {
        name: audited(plan, noisy_sites, tmp_path / name, sizes)
        for name, plan in {"none": plain, "private": private}.items()
    }

    def updates(audit: Audit) -> float:
        return max(one.epsilon for one in audit.bounds if one.attack == "canaries, all updates")

    assert updates(found["none"]) > 0.8
    assert updates(found["private"]) <= PRIVATE["epsilon"]
    assert not found["private"].broken
    steps = [one for one in found["private"].bounds if one.attack == "canaries, single steps"]
    assert {one.site for one in steps} == {"site-1", "site-2"}
    assert all(one.guesses > 100 for one in steps)


def test_an_image_is_drawn_back_out_of_an_update_without_privacy_and_not_with_it(
    make_plan: Callable[..., Plan], noisy_sites: list[PreparedSite]
) -> None:
    site, runtime = smooth(noisy_sites[0]), Runtime(randomness="seeded")
    drawn = {}
    for name, privacy in {"none": {"mechanism": "none"}, "private": PRIVATE}.items():
        plan = one_step_plan(make_plan, **privacy)
        arrays = to_arrays(build_model(plan, 0))
        drawn[name] = inversion.invert(plan, site, 3, arrays, runtime, seed=1)
    assert abs(drawn["none"].correlation) > 0.7, drawn
    assert abs(drawn["private"].correlation) < 0.4, drawn
    assert drawn["none"].ssim > drawn["private"].ssim
    assert drawn["none"].mse < drawn["private"].mse


def smooth(site: PreparedSite) -> PreparedSite:
    """Images with something to see on them: a bright disc each, in a place of its own."""
    rng, (rows, columns) = np.random.default_rng(4), np.mgrid[:SIZE, :SIZE]
    centres = rng.uniform(3, SIZE - 3, (len(site.images), 2))
    discs = [np.hypot(rows - y, columns - x) < 2.5 for y, x in centres]
    return replace(site, images=np.stack(discs)[:, None].astype(np.float32))


@pytest.fixture
def private_study(
    make_plan: Callable[..., Plan],
    noisy_sites: list[PreparedSite],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Study:
    """A study of the plan with `audit = true`, over the noisy hospitals, not run yet."""
    plan = one_step_plan(make_plan, **PRIVATE)
    options = Options(data=None, out=tmp_path / "out", device="cpu")
    options.out.mkdir()
    study = Study(plan, options, note=lambda text: None)
    monkeypatch.setattr(study, "prepare", lambda: noisy_sites)
    return study


def test_the_release_gate_lets_a_true_promise_pass(private_study: Study) -> None:
    private_study.run()
    gate(private_study, Console(quiet=True))
    assert private_study.model is not None
    told = Audit.model_validate_json((private_study.options.out / FILE).read_text("utf-8"))
    assert private_study.results.audit == told and not told.broken
    picture = private_study.options.out / PICTURE
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_mode & 0o777 == 0o600


def test_the_release_gate_finds_noise_that_is_not_there(
    private_study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: steps add hardly any noise, while the site accounts for all of it."""
    whole = PrivateStep.__init__

    def broken(
        self: Any, module: Any, optimizer: Any, mechanism: Any, *more: Any, **named: Any
    ) -> None:
        whole(self, module, optimizer, replace(mechanism, noise_multiplier=1e-6), *more, **named)

    monkeypatch.setattr(PrivateStep, "__init__", broken)
    private_study.run()
    assert private_study.results.arms[0].privacy["site-1"].epsilon <= PRIVATE["epsilon"]
    with pytest.raises(ReleaseError) as told:
        gate(private_study, Console(quiet=True))
    assert told.value.exit_code == 26 and private_study.model is None
    audit = json.loads((private_study.options.out / FILE).read_text("utf-8"))
    worst = max(one["epsilon_jointly"] for one in audit["bounds"])
    assert worst > PRIVATE["epsilon"]
