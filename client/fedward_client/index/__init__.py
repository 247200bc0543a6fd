"""What is known of every file of a dataset, found once and kept in SQLite; no identifier in it."""
