"""Everything that runs the server somewhere: on one host, on Kubernetes, on many machines."""
