"""The models of finished studies at a hospital: kept, listed, exported whole or not at all."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import load_file

from fedward.errors import ModelError, OutputError, PolicyError, StudyError
from fedward.integrity import about_model
from fedward.models import build_model, load_model, save_model, to_arrays
from fedward.plan import plan_hash
from fedward.signing import fingerprint, public_bytes, sign_model
from fedward_client.kept_models import KeptModels
from fedward_client.policy.settings import PolicySection

Make = Callable[..., Any]


@pytest.fixture
def kept(tmp_path: Path, make_plan: Make) -> KeptModels:
    plan, made = make_plan(), KeptModels(tmp_path / "state")
    arrays = to_arrays(build_model(plan, 0))
    made.keep("study-1", plan, "shared", arrays)
    made.keep("study-1", plan, "own", {n: v + 1 for n, v in arrays.items()})
    return made


def test_a_model_is_listed_and_exported_for_its_owner_alone(
    kept: KeptModels, make_plan: Make, tmp_path: Path
) -> None:
    plan = make_plan()
    told = {one.which: one for one in kept.all()}
    assert set(told) == {"own", "shared"}
    assert {one.plan_hash for one in told.values()} == {plan_hash(plan)}
    assert told["own"].name == plan.study.name
    out = tmp_path / "own.safetensors"
    assert kept.export("study-1", "own", out) == told["own"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    for name, value in to_arrays(build_model(plan, 0)).items():
        np.testing.assert_array_equal(load_file(out)[name], value + 1)


def test_an_export_replaces_nothing_and_leaves_no_part(kept: KeptModels, tmp_path: Path) -> None:
    out = tmp_path / "there.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(OutputError, match="replaces no file"):
        kept.export("study-1", "own", out)
    assert out.read_bytes() == b"mine"
    missing = tmp_path / "no such folder" / "own.safetensors"
    with pytest.raises(OutputError, match="must be writable"):
        kept.export("study-1", "own", missing)
    assert not missing.parent.exists()
    with pytest.raises(StudyError, match=r"own of other; kept of it: none.*model list"):
        kept.export("other", "own", tmp_path / "x.safetensors")


@pytest.fixture
def delivered(tmp_path: Path, make_plan: Make) -> Callable[..., Path]:
    """Writes a model's file as an aggregator delivers it."""

    def write(key: Ed25519PrivateKey, seed: int = 0, **changed: str) -> Path:
        plan, path = make_plan(), tmp_path / f"{seed}.safetensors"
        arrays = to_arrays(build_model(plan, seed))
        about = sign_model(key, about_model("study-7", plan, "shared"), arrays)
        save_model(path, arrays, about | changed)
        return path

    return write


def test_a_delivered_model_is_kept_if_an_accepted_coordinator_signed_it(
    delivered: Make, tmp_path: Path
) -> None:
    key, kept = Ed25519PrivateKey.generate(), KeptModels(tmp_path / "state")
    policy = PolicySection(coordinators=(fingerprint(public_bytes(key)),))
    path = delivered(key)
    found = kept.add(path, policy)
    assert (found.study, found.which) == ("study-7", "shared")
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert kept.add(path, policy) == found  # again changes nothing
    assert kept.add(path, policy, study="study-7") == found
    with pytest.raises(ModelError, match=r"of the study that was asked for \(got study-7"):
        kept.add(path, policy, study="study-8")
    other = delivered(key, 1)
    with pytest.raises(StudyError, match="a study has one shared model"):
        kept.add(other, policy)
    assert kept.all() == [found]


def test_a_model_that_nobody_accepted_signed_is_refused(delivered: Make, tmp_path: Path) -> None:
    key, kept = Ed25519PrivateKey.generate(), KeptModels(tmp_path / "state")
    with pytest.raises(PolicyError, match=r"coordinator that policy\.coordinators accepts"):
        kept.add(delivered(key), PolicySection())
    everybody = PolicySection(any_coordinator=True)
    for changed in ({"signature": ""}, {"study": "study-8"}, {"which": "own"}):
        with pytest.raises(ModelError, match="must be signed by its coordinator"):
            kept.add(delivered(key, **changed), everybody)
    arrays, about = load_model(delivered(key))
    name = next(iter(arrays))
    arrays[name] = arrays[name] + 1
    save_model(tmp_path / "changed.safetensors", arrays, about)
    with pytest.raises(ModelError, match="another signature"):
        kept.add(tmp_path / "changed.safetensors", everybody)
    del about["signature"]
    save_model(tmp_path / "unsigned.safetensors", arrays, about)
    with pytest.raises(ModelError, match="no signature"):
        kept.add(tmp_path / "unsigned.safetensors", everybody)
    assert kept.all() == []
    assert kept.add(delivered(key), everybody).study == "study-7"


def test_a_model_is_removed_once(kept: KeptModels) -> None:
    assert kept.remove("study-1") == 2
    assert kept.all() == []
    with pytest.raises(StudyError, match="must be kept here"):
        kept.remove("study-1")


def test_a_damaged_file_is_told(kept: KeptModels, tmp_path: Path) -> None:
    path = next((tmp_path / "state" / "models").glob("*/own.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OutputError, match="a kept model must be readable"):
        kept.all()
