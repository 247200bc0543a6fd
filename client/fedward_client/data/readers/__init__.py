"""Readers, one module per format; each has ``read(root, task) -> Dataset``."""
