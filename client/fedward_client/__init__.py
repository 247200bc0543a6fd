"""The hospital: datasets, training and privacy."""
