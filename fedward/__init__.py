"""What both sides of a study must agree on."""
