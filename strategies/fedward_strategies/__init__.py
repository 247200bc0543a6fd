"""How many updates become one model."""

import fedward as fedward  # before torch, which it makes start sooner
