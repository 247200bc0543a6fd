"""Frozen cohorts of a dataset, and its report, risks, preview and check against a plan."""
