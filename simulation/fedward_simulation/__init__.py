"""A study on one machine or a Ray cluster, with the same server and client."""
