"""The process that has the images and no network."""
