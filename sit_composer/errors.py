"""What is told to a user in one line, without a traceback."""


class UserError(ValueError):
    """A mistake in a config, a command or the data: what is wrong, where, and what to do. Commands exit with 2."""
