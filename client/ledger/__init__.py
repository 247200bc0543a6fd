"""The privacy ledger: what the patients of a hospital have been charged, for good."""

from client.ledger.ledger import Caps, Charge, Ledger, Release, RoundRequest
from client.ledger.store import accept_older, name_secret

__all__ = ["Caps", "Charge", "Ledger", "Release", "RoundRequest", "accept_older", "name_secret"]
