"""Code that uses private modules of Flower: SuperLink, clients of its APIs, grids."""
