"""What a program costs and what it gives: FLOPs, compiled programs, calibration, over-optimisation."""
