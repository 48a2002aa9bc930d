"""The errors that a user sees as one line, without a traceback; and the commands' exit codes."""

import errno
import re

USAGE = 2  # a mistake in a config, a command or the data
INTERRUPTED = 130  # 128 + SIGINT
EVICTED = 143  # 128 + SIGTERM: schedulers read it as "told to end", and start the job again


class UserError(ValueError):
    """A mistake in a config, a command or the data: where, what is wrong, what was expected, and what to do."""


class StorageError(UserError):
    """A folder or an object store can't be used: which, and why in the store's own words."""


def is_disk_full(error: BaseException) -> bool:
    """Whether a full disk raised the error, also through torch's writers of checkpoints."""
    for cause in (error, *(failure[0] for failure in getattr(error, "failures", {}).values())):  # torch's, of the ranks
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        # torch's archive writer raises this after a short write, without the reason.
        if isinstance(cause, RuntimeError) and re.search(r"PytorchStreamWriter failed|unexpected pos \d+", str(cause)):
            return True
    return False


class NewerVersion(UserError):
    """A file is of a newer version of sit_composer."""


def check_version(found: object, known: int, where: str) -> None:
    """Raises UserError unless a file's format version is one of 1 to ``known``. A file without one, None, has 1."""
    if type(found) is int and found > known:
        newer = f"written by a newer version of sit_composer (format {found}), expected format {known} at most"
        raise NewerVersion(f"{where}: {newer}; update sit_composer")
    if found is not None and (type(found) is not int or found < 1):
        raise UserError(f"{where}: version: got {found!r}, expected a whole number from 1 to {known}")


def one_line(error: BaseException) -> str:
    """An error's whole message on one line, or the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
