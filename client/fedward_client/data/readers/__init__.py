"""One module per kind of source; each has ``read(root, task) -> Dataset``."""
