"""MONAI starts without what nothing here needs of it; everybody else finds it as ever."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOOK = """
import json, sys
import fedward.models
early = sorted({"matplotlib", "sklearn"} & set(sys.modules))
import matplotlib.pyplot, sklearn.metrics
print(json.dumps([early, sorted({"matplotlib", "sklearn"} & set(sys.modules))]))
"""


def test_models_load_neither_matplotlib_nor_scikit_learn_and_both_can_be_had() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [[], ["matplotlib", "sklearn"]]
