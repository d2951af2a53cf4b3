"""What the command line tells in one line: a user's mistake (exit status 2), or work that failed (status 1)."""


class InputError(ValueError):
    """Wrong input from the user: a path, a setting, a file's content.

    The message is one line that names the file or key, the value found and what is allowed. The command
    line prints it without a traceback and exits with status 2.
    """


class MissingExtra(InputError):
    """A feature's library is not installed; the message says which ``pip install`` brings it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; run: pip install 'benthic[{extra}]'")


class WorkFailed(RuntimeError):
    """The work could not be finished, through no fault of the input: a full disk, a loss that diverged.

    The message is one line. The command line prints it without a traceback and exits with status 1.
    """
