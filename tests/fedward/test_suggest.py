"""Words that may have been meant."""

from __future__ import annotations

import pytest

from fedward.plan.schema import Model, Privacy, Training
from fedward.suggest import nearest


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("lr", "learning_rate"),
        ("learningRate", "learning_rate"),
        ("learn_rate", "learning_rate"),
        ("epochs", "local_epochs"),
        ("batchsize", "batch_size"),
        ("batch", "batch_size"),
        ("optimiser", "optimizer"),
        ("wd", "weight_decay"),
        ("eps", "epsilon"),
        ("clip", "clipping_norm"),
        ("weights", "class_weights"),
        ("q", ""),
        ("", ""),
    ],
)
def test_the_usual_spellings_lead_to_the_key(written: str, meant: str) -> None:
    fields = Training.model_fields if meant not in Privacy.model_fields else Privacy.model_fields
    assert nearest(written, fields) == meant


def test_a_model_is_found_however_it_is_written() -> None:
    names = ["cnn", "resnet18", "resnet50", "efficientnet-b0", *Model.model_fields]
    assert nearest("ResNet-50", names) == "resnet50"
    assert nearest("EfficientNetB0", names) == "efficientnet-b0"
