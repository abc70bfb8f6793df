"""What a model knows and can do without being trained for it: likelihoods of answers, and the harness that asks."""
