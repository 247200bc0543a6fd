"""The commands of ``fedward-server``."""
