"""Differential privacy: mechanisms and the counts that they release."""
