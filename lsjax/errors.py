"""The exception that means "you can fix this": it names the key or file and the remedy, in one line."""


class UserError(Exception):
    """Bad input. Commands print its message as one line on standard error and exit with status 2."""


class HostLostError(UserError):
    """Another process of the run is gone: this one cannot go on, nor wait for the others in an orderly end."""
