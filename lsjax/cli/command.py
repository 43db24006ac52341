"""Runs one command: its flags, its --help, bad input as one line, and the exit status."""

import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from absl import flags, logging

from lsjax.cli.ending import BAD_INPUT, say
from lsjax.cli.flags import HELP, Arguments, CommandFlags, fill_paragraphs
from lsjax.errors import UserError


class Command(NamedTuple):
    """A module of this package as a command.

    name: such as "decode". text: what --help prints above the flags, with the command called as `lsjax NAME`.
    define_flags: defines its flags. main: runs it, and returns its exit status (None: 0).
    """

    name: str
    text: str
    define_flags: Callable[[CommandFlags], None]
    main: Callable[[Arguments], int | None]


def run(command: Command, arguments: Sequence[str], program: str, call: str) -> int:
    """Runs a command and returns its exit status: 2 after bad input, which is one line on standard error.

    program: the name before that line. call: how a person calls the command, for the examples of --help.
    """
    prepare_process()
    command_flags = CommandFlags()
    command.define_flags(command_flags)
    try:
        if any(argument in HELP for argument in arguments):
            text = fill_paragraphs(command.text).replace(f"lsjax {command.name} ", f"{call} ")
            print(f"{text}\n\n{command_flags.help_text()}")
            return 0
        return command.main(command_flags.parse(arguments)) or 0
    except UserError as error:
        if _among_others():
            say(program, error)
            time.sleep(2)  # so that the other processes, which found the same fault, can print it too
            os._exit(BAD_INPUT)  # an orderly end would wait for the other processes
        say(program, error)
        return BAD_INPUT


def prepare_process() -> None:
    """Sets what holds for the whole process: quiet libraries, threads for virtual devices, text for any terminal."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    _thread_every_virtual_device()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS([sys.argv[0]])  # libraries read absl's own flags, at their defaults
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal cannot show becomes a replacement sign
            stream.reconfigure(errors="replace")


def _thread_every_virtual_device() -> None:
    """Gives XLA:CPU threads for two programs in flight on every virtual device, and twice that for their own work.

    By default it has one thread per device. A collective keeps its thread until the other devices arrive. When no
    thread is left for them to arrive on, all wait until XLA gives up.
    """
    devices = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    if devices.isdecimal() and int(devices) > 1:
        os.environ.setdefault("PJRT_NPROC", str(4 * int(devices)))


def _among_others() -> bool:
    """Returns whether this process is one of several of a run, without starting JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()
