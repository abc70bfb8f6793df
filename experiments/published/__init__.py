"""The experiments on published data."""
