"""The hospital: datasets, training and privacy."""

import fedward as fedward  # before torch, which it makes start sooner
