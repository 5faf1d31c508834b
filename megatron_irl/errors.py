"""The failures a user meets: each is printed as one message, without a traceback, exit code 2."""


class UserError(ValueError):
    """The user's input is wrong; the message says what conflicts and what to set."""


def tell_elsewhere[E: UserError](error: E) -> E:
    """Mark an error as another rank's, which prints it; returns it."""
    error.is_told_elsewhere = True  # type: ignore[attr-defined]
    return error


def is_told_elsewhere(error: UserError) -> bool:
    """Whether another rank tells the user of an error."""
    return getattr(error, "is_told_elsewhere", False)


class TrainingDiverged(UserError):
    """The loss or the gradient is not finite; the last good checkpoint is kept."""


STOPPED, HUNG = 75, 76
"""Exit codes: stopped as asked, and ended by the watchdog; the same command resumes both."""


class RunStopped(BaseException):
    """A run was asked to stop, and every rank does. No error: nothing that handles errors sees it.

    The message says who asked.
    """
