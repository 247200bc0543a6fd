"""What both sides of a study must agree on."""

from fedward.lean import import_monai_lean

import_monai_lean()
