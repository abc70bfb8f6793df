"""The cost of programs and the worth of scores: FLOPs, compiled programs, calibration, over-optimisation."""
