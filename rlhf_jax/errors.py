"""The error that a user can act on. It is apart from `types`, so that what needs no JAX imports none."""


class InputError(ValueError):
    """An input that the user supplied cannot be used. The message is one line: what, where, and what to do."""
