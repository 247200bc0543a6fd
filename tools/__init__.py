"""Tools of the repository; not shipped."""
