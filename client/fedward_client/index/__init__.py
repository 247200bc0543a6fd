"""Index of a dataset's files in SQLite, without identifiers."""
