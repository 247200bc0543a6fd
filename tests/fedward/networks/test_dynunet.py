"""DynUNet: each array once, and MONAI's own output."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DynUNet
from networks import small_plan

from fedward.dp.compat import make_private
from fedward.models import build_model, to_arrays


@pytest.mark.parametrize("dimensions", [2, 3])
def test_it_is_monais_network_with_each_array_once(dimensions: int) -> None:
    plan = small_plan("dynunet", dimensions)
    model = build_model(plan, 0).eval()
    theirs = DynUNet(dimensions, 1, 3, (3, 3, 3), (1, 2, 2), (2, 2), filters=(4, 8, 8))
    make_private(theirs).eval()
    arrays, own = to_arrays(model), sum(p.numel() for p in theirs.parameters())
    assert sum(array.size for array in arrays.values()) == own
    assert len(arrays) == len(list(model.parameters()))
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith(("input_b", "downs", "bottle", "ups")) for name in missing)
    image = torch.randn(2, 1, *plan.preprocessing.size)
    with torch.no_grad():
        assert torch.equal(model(image), theirs(image))
