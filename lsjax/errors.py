"""The exception that means "you can fix this": it names the key or file and the remedy, in one line."""


class UserError(Exception):
    """Bad input. Commands print its message as one line on standard error and exit with status 2."""
