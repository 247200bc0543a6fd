"""The aggregator: the server application and its report."""
