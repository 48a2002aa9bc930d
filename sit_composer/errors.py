"""The errors that a user sees as one line, without a traceback; and the commands' exit codes."""

USAGE = 2  # a mistake in a config, a command or the data
INTERRUPTED = 130  # 128 + SIGINT
EVICTED = 143  # 128 + SIGTERM: schedulers read it as "told to end", and start the job again


class UserError(ValueError):
    """A mistake in a config, a command or the data: where, what is wrong, what was expected, and what to do."""


def one_line(error: BaseException) -> str:
    """An error's whole message on one line, or the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
