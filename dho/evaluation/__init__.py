"""From head outputs to alpha, beta, metrics and plots."""
