"""Training on several processes: what they share, and weights that are divided among them."""
