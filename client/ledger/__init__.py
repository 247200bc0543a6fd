"""The privacy ledger: what the patients of a hospital have been charged, for good."""

from client.ledger.ledger import Charge, Ledger, Release, RoundRequest
from client.ledger.store import accept_older, name_secret

__all__ = ["Charge", "Ledger", "Release", "RoundRequest", "accept_older", "name_secret"]
