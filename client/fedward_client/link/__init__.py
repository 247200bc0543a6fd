"""The socket between connector and trainer."""
