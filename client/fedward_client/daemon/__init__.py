"""A hospital's two processes, kept apart and kept running."""
