"""A study on one machine or a Ray cluster, with the same server and client."""

import fedward as fedward  # before torch, which it makes start sooner
