"""The failures a user meets: each is printed as one message, without a traceback, exit code 2."""


class UserError(ValueError):
    """The user's input is wrong; the message says what conflicts and what to set."""


class TrainingDiverged(UserError):
    """The loss or the gradient is not finite; the last good checkpoint is kept."""
