"""Differential privacy: noise of training and of counts, and the randomness behind it."""
