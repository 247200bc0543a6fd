"""Arrays out and in, trainable names, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedward.errors import ModelError, OutputError
from fedward.models.arrays import (
    describe,
    freeze,
    from_arrays,
    load_model,
    save_model,
    to_arrays,
    trainable_names,
)
from fedward.plan.schema import ModelName

MODELS: tuple[ModelName, ...] = get_args(ModelName)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_and_description(plan_for: Any, built: Any, name: ModelName) -> None:
    small = {"channels": (4, 4, 8, 8)} if name.startswith("resnet") else {}
    plan = plan_for(name, **small)
    one, other = built(plan, 0), built(plan, 1)
    sent = to_arrays(one)
    from_arrays(other, sent)
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key])
    facts = describe(plan)
    assert facts.arrays == {key: (array.shape, "float32") for key, array in sent.items()}
    assert list(facts.arrays) == list(sent)
    assert facts.bytes == sum(array.nbytes for array in sent.values())
    assert facts.parameters == sum(p.numel() for p in one.parameters())
    assert all(array.flags.c_contiguous for array in sent.values())


def test_arrays_share_no_memory(plan_for: Any, built: Any) -> None:
    model = built(plan_for(), 0)
    arrays_ = to_arrays(model)
    before = arrays_["fc.bias"].copy()
    with torch.no_grad():
        model.get_parameter("fc.bias").add_(1)
    assert np.array_equal(arrays_["fc.bias"], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strange": np.zeros(2, np.float32)}, "strange: the model has no such array"),
        ({"fc.bias": np.zeros(3, np.float32)}, r"fc\.bias: .+shape \(2,\) \(got \(3,\)\)"),
        ({"fc.bias": np.zeros(2)}, r"fc\.bias: arrays must be float32 \(got float64\)"),
        ({"fc.bias": np.array([0, np.nan], np.float32)}, r"fc\.bias: arrays must be finite"),
        ({"fc.bias": np.array([0, -np.inf], np.float32)}, r"fc\.bias: arrays must be finite"),
    ],
)
def test_a_wrong_array_is_named_and_nothing_changes(
    plan_for: Any, built: Any, change: dict[str, Any], message: str
) -> None:
    model = built(plan_for(), 0)
    before = to_arrays(model)
    shifted = {key: array + 1 for key, array in before.items()}
    with pytest.raises(ModelError, match=message):
        from_arrays(model, {**shifted, **change})
    after = to_arrays(model)
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_missing_array_is_refused_unless_partial(plan_for: Any, built: Any) -> None:
    model = built(plan_for(), 0)
    only = {"fc.bias": np.full(2, 5, np.float32)}
    only["fc.bias"].flags.writeable = False
    with pytest.raises(ModelError, match="must cover the whole model"):
        from_arrays(model, only)
    from_arrays(model, only, partial=True)
    assert to_arrays(model)["fc.bias"].tolist() == [5, 5]


def test_whole_numbers_cannot_be_exchanged() -> None:
    with pytest.raises(ModelError, match="num_batches_tracked"):
        to_arrays(torch.nn.BatchNorm2d(3))


def test_patterns_choose_parameters(plan_for: Any, built: Any) -> None:
    model = built(plan_for(), 0)
    names = [name for name, _ in model.named_parameters()]
    assert trainable_names(model, ["*"]) == tuple(names)
    assert trainable_names(model, ["fc.*", "level2.*"]) == tuple(
        name for name in names if name.startswith(("level2.", "fc."))
    )
    with pytest.raises(ModelError, match=r"every pattern .+ \(got head\.\*\)"):
        trainable_names(model, ["fc.*", "head.*"])


def test_freeze_leaves_just_the_named_ones(plan_for: Any, built: Any) -> None:
    model = built(plan_for(), 0)
    freeze(model, ["fc.weight"])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["fc.weight"]
    freeze(model, ["fc.bias"])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["fc.bias"]
    with pytest.raises(ModelError, match="no such parameter"):
        freeze(model, ["fc.bias", "fc.other"])


@settings(max_examples=20, deadline=None)
@given(
    array=arrays(np.float32, array_shapes(min_dims=0, max_dims=4)),
    metadata=st.dictionaries(st.text(), st.text(), max_size=3),
)
def test_files_bring_back_every_bit(
    tmp_path_factory: pytest.TempPathFactory, array: Any, metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, {"a": array, "b": array.T}, metadata)
    loaded, read = load_model(path)
    assert read == metadata
    assert loaded["a"].tobytes() == array.tobytes()
    assert np.array_equal(loaded["b"], array.T, equal_nan=True)


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    facts = dict.fromkeys("abcdefgh", "of the study")
    for place in range(8):
        turned = dict(sorted(facts.items(), reverse=bool(place % 2)))
        save_model(tmp_path / f"{place}", {"w": np.ones((3, 5), np.float32)}, turned)
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


def test_a_failed_write_keeps_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, old = tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)}
    save_model(path, old, {})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left") as caught:
        save_model(path, {"a": np.zeros(2, np.float32)}, {})
    assert str(tmp_path) not in str(caught.value)
    assert load_model(path)[0]["a"].tolist() == [1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("content", [None, b"", b"\x08\0\0\0\0\0\0\0{}", b"not a model at all"])
def test_an_unreadable_file_is_a_model_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "secret-name.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match="readable safetensors file") as caught:
        load_model(path)
    assert "secret-name" not in str(caught.value)
