"""The study's networks: built from a plan, private by construction, exchanged as named arrays."""
