"""The aggregator: the server application and its report."""

import fedward as fedward  # before torch, which it makes start sooner
