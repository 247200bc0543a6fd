"""DynUNet: each array once, and MONAI's own output."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets import DynUNet
from networks import by_loop, check_clipped_sum, small_plan

from fedward.dp.compat import make_private
from fedward.models import build_model, to_arrays
from fedward.models.registry import best_mode
from fedward_client.training.losses import build_loss


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


def test_its_levels_answer_in_training_and_only_then() -> None:
    plan = small_plan("dynunet", channels=(4, 8, 8, 8), deep_supervision=True)
    model = build_model(plan, 0)
    plain = build_model(small_plan("dynunet", channels=(4, 8, 8, 8)), 0).eval()
    assert len(to_arrays(model)) == len(list(model.parameters())) > len(to_arrays(plain))
    plain.load_state_dict(model.state_dict(), strict=False)
    image = torch.randn(2, 1, *plan.preprocessing.size)
    answers = model.train()(image)
    assert answers.shape == (2, 2, 3, *plan.preprocessing.size)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(image), plain(image))
    loss = build_loss(plan, torch.device("cpu"))
    truth = torch.randint(0, 3, (2, *plan.preprocessing.size))
    each = [loss(one, truth) for one in answers.unbind(dim=1)]
    torch.testing.assert_close(loss(answers, truth), (2 * each[0] + each[1]) / 3)
    loss(answers, truth).sum().backward()
    missing = [name for name, one in model.named_parameters() if one.grad is None]
    assert not missing, "every array learns"
    copy.deepcopy(model)  # nothing of a batch hangs on it
    assert best_mode(model) == "bookkeeping"
    private, images = model.train().double(), image.double()
    check_clipped_sum(private, images, by_loop(private, images))
