"""Randomness that the privacy proof rests on: keys, keystreams and the noise drawn from them."""

from fedward.dp.gaussian import GaussianNoise
from fedward.dp.keystream import Keystream, derive_key

__all__ = ["GaussianNoise", "Keystream", "derive_key"]
