"""Studies: several runs of the experiments, compared over seeds."""
