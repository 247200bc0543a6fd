"""Code that aggregator and hospital share: plan, records, models, metrics, privacy."""
