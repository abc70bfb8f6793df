"""Data: TFDS builders for storage, Grain for iteration, and the embedded assistant world."""
