"""The importer: fetches images from the PACS into a dataset's folder, and does nothing else."""
