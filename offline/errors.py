"""The one error that is the user's to mend: shown without a traceback, exit code 2."""


class InputError(ValueError):
    """Bad input; the message says where, what was found and what is allowed."""
