"""Everything on the server that touches Flower's internals; pinned to one Flower release."""
