"""The training loop (Algorithm 1) and what keeps it alive."""
