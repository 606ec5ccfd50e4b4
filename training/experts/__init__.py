"""How neurons become experts, how routers find them, and what is measured of both."""
