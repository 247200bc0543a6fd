"""The privacy ledger: what the patients of a hospital have been charged, for good."""

from client.ledger.ledger import Charge, Ledger, Release, RoundRequest

__all__ = ["Charge", "Ledger", "Release", "RoundRequest"]
