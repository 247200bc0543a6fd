"""Everything that touches Flower's private parts; no other package may import them."""
