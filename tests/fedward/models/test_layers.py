"""The layers against PyTorch's own and against the padding rule written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedward.dp.compat import group_norm
from fedward.models.efficientnet_layers import FrozenBatchNorm2d, SamePad
from fedward.models.registry import build_model


def test_frozen_norm_is_batch_norm_in_evaluation() -> None:
    torch.manual_seed(0)
    reference = nn.BatchNorm2d(5, eps=1e-3).eval()
    for tensor in (reference.weight, reference.bias, reference.running_mean):
        nn.init.normal_(tensor)  # type: ignore[arg-type]
    nn.init.uniform_(reference.running_var, 0.1, 3)  # type: ignore[arg-type]
    frozen = FrozenBatchNorm2d(5)
    frozen.load_state_dict(reference.state_dict(), strict=False)
    images = torch.randn(4, 5, 6, 7)
    torch.testing.assert_close(frozen.train()(images), reference(images))
    assert not list(frozen.parameters())
    assert torch.equal(frozen.running_mean, reference.running_mean)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    side=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
)
def test_same_padding_rounds_up_and_puts_the_rest_last(
    side: tuple[int, int], kernel: int, stride: int, dilation: int
) -> None:
    pad = SamePad((kernel, kernel), (stride, stride), (dilation, dilation))
    conv = nn.Conv2d(1, 1, kernel, stride, dilation=dilation)
    padded = pad(torch.ones(1, 1, *side))
    out = conv(padded)
    assert tuple(out.shape[2:]) == tuple(math.ceil(s / stride) for s in side)
    inside = padded[0, 0].nonzero()
    before = inside.min(0).values.tolist()
    after = [p - 1 - last for p, last in zip(padded.shape[2:], inside.max(0).values, strict=True)]
    assert all(int(a) - b in (0, 1) for a, b in zip(after, before, strict=True))


@given(channels=st.integers(1, 600))
def test_groups_divide_and_stay_wide(channels: int) -> None:
    norm = group_norm(channels)
    assert channels % norm.num_groups == 0
    assert norm.num_groups <= 32
    assert norm.num_groups == 1 or channels // norm.num_groups >= 4


@pytest.mark.parametrize("intensity", ["unit", "imagenet"])
def test_lite0_input_becomes_what_its_weights_saw(plan_for: Any, intensity: str) -> None:
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    levels = torch.linspace(0, 1, 5).expand(3, 5)
    given_ = levels if intensity == "unit" else (levels - mean[:, None]) / deviation[:, None]
    model = build_model(plan_for("efficientnet-lite0", intensity=intensity), 0)
    layer = model.get_submodule("_conv_stem_padding.0")
    seen = layer(given_[None, :, None, :])[0, :, 0]
    torch.testing.assert_close(seen, (levels * 255 - 127) / 128)
