"""Other makers' checkpoints: their configurations, tensors and names, read and written."""
