"""What an index says about a dataset as a whole."""
