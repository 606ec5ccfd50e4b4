"""One server process, from its command line to its end."""
