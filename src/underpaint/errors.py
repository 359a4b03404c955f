"""The two ways a run ends badly, each with its exit status."""


class InputError(Exception):
    """A usage or input error: one line that says what, where, and what would be right. Exit status 2."""


class NotFinite(Exception):
    """Training stopped because the loss stayed not finite; the last good checkpoint is kept. Exit status 3."""
