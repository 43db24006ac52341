"""Compiles lsjax's programs ahead of time for hardware that this machine does not have, and reads the results."""
