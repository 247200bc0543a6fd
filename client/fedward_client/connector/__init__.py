"""The process that has the network and no images."""
