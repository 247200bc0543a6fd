"""The operator API: HTTP, described by OpenAPI, for the command line and for programs."""
