"""A plan is read where there is no torch, and knows every network."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import get_args

import pytest

from fedward.errors import ModelError
from fedward.networks import MODELS, _by_name
from fedward.plan.schema import ModelName, Task


def test_reading_plans_loads_neither_torch_nor_monai() -> None:
    code = (
        "import sys, fedward.plan, fedward.plan.explain\n"
        "found = {'torch', 'monai', 'opacus', 'einops'} & set(sys.modules)\n"
        "sys.exit(', '.join(found) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_plans_vocabulary_is_what_is_there() -> None:
    kinds = set(get_args(Task.model_fields["kind"].annotation))
    assert get_args(ModelName) == tuple(MODELS)
    for spec in MODELS.values():
        assert set(spec.tasks) <= kinds, spec.name
        if spec.widths is not None:
            assert spec.widths.fits(spec.widths.default) and spec.widths.fits(spec.widths.least)


def test_two_networks_of_one_name_are_refused() -> None:
    one = MODELS["cnn"]
    with pytest.raises(ModelError, match="one name"):
        _by_name(iter((one, replace(one, summary="another"))))
