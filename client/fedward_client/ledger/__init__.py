"""The privacy ledger: a permanent record of the ε charged to a hospital's patients."""

from fedward_client.ledger.ledger import Caps, Charge, Ledger, Release, RoundRequest
from fedward_client.ledger.store import accept_older, name_secret

__all__ = ["Caps", "Charge", "Ledger", "Release", "RoundRequest", "accept_older", "name_secret"]
