"""Measures of a model that is not trained for them: likelihoods of answers, and the harness that asks."""
