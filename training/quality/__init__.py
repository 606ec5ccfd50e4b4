"""How good a model is: perplexity, tasks, and what its experts cover."""
