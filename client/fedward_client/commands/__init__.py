"""The commands of ``fedward-client``."""
