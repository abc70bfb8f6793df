"""People in the loop: a page on which they rank, rate, compare and write, and the store of what they said.

Nothing here imports JAX, so the page starts at once and runs on a machine without an accelerator.
"""
