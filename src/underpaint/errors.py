"""The ways a command ends badly, each with its exit status."""


class InputError(Exception):
    """A usage or input error: one line that says what, where, and what would be right. Exit status 2."""


class Stopped(Exception):
    """What had begun could not go on: one line that says why, and what is kept. Exit status 3."""


class NotFinite(Stopped):
    """Training stopped because the loss stayed not finite; the last good checkpoint is kept."""
