"""Apply a finished study's model to images of the hospital."""
