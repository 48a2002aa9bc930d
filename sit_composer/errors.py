"""What is told to a user in one line, without a traceback."""


class UserError(ValueError):
    """A mistake in a config, a command or the data: what is wrong, where, and what to do. Commands exit with 2."""


EVICTED = 143  # exit code after a SIGTERM, 128 + 15: schedulers take it for "told to end", and start the job again
