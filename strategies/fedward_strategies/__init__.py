"""How many updates become one model."""
