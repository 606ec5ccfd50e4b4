"""The HTTP routes, one file per interface."""
