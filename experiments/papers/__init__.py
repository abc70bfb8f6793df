"""Published configurations and recipes."""
