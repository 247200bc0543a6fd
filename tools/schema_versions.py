"""What each schema version of plans knows, as ``tests/fedward/plan/schema_versions.json`` has it.

Run it at a release: ``python -m tools.schema_versions > tests/fedward/plan/schema_versions.json``.
"""

from __future__ import annotations

import json
import sys

from fedward.plan.schema import Plan
from fedward.plan.versions import vocabulary

if __name__ == "__main__":
    sys.stdout.write(json.dumps(vocabulary(Plan), indent=1, sort_keys=True) + "\n")
