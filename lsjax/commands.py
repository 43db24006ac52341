"""What every command in launch/ shares: flags parsed with one-line errors, exit status 2 on bad input."""

import os
import re
import sys
import time
from collections.abc import Callable

from absl import app, flags, logging

from lsjax.config import Config
from lsjax.errors import UserError


def run(main: Callable[[], int | None]) -> None:
    """Runs a command. Bad flags and UserError print one line on standard error and exit with status 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    _thread_every_virtual_device()
    logging.set_verbosity(logging.WARNING)
    app.run(lambda _: _guarded(main), flags_parser=_parse)


def _thread_every_virtual_device() -> None:
    """Gives XLA:CPU threads for two programs in flight on all its devices, and as many for what runs inside them.

    By default it has one a device. A collective keeps its thread until the other devices arrive, and where none is
    left for these to arrive on, all wait until XLA gives up.
    """
    devices = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    if devices.isdecimal() and int(devices) > 1:
        os.environ.setdefault("PJRT_NPROC", str(4 * int(devices)))


def _last_line(error: Exception) -> str:
    """ml_collections folds whole tracebacks into its messages; the last line says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def fail(message: object) -> None:
    _print_error(message)
    sys.exit(2)


def _print_error(message: object) -> None:
    name = os.path.basename(sys.argv[0])
    print(f"{name}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def read_config(flag: flags.FlagHolder) -> Config:
    """The checked configuration of a --config flag; UserError when its file is missing or wrong."""
    try:
        tree = flag.value.to_dict()
    except Exception as error:  # whatever the configuration file, a program, may raise
        raise UserError(f"cannot load the file of --{flag.name}: {error.__cause__ or error}") from None
    return Config.from_dict(tree)


def _guarded(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except UserError as error:
        if _among_others():
            _print_error(error)
            sys.stdout.flush()
            time.sleep(2)  # what all of them found, all of them say
            os._exit(2)  # an orderly end would wait for hosts that are gone, or wait for us
        fail(error)
    except BrokenPipeError:  # the reader of our output went away
        os._exit(1)


def _among_others() -> bool:
    """Whether this process is one of several of a run; asked without starting JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _parse(arguments: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(arguments)
    except (AttributeError, KeyError) as error:  # ml_collections, on a key that the config does not have
        detail = re.sub(r"(?:\\n|[\n'])+", " ", str(error.args[0])).strip() if error.args else ""
        fail(f"unknown config key {detail} (lsjax/config.py lists them all)")
    except flags.Error as error:
        fail(f"{_last_line(error)} (see --help)")
    except Exception as error:  # a configuration file is a program: it may raise anything
        fail(f"the configuration cannot be read: {type(error).__name__}: {_last_line(error)} (see --help)")
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; every option is --name=value (see --help)")
    return rest


def integers(flag: flags.FlagHolder) -> tuple[int, ...]:
    """The numbers of a comma-separated flag."""
    try:
        return tuple(int(value) for value in flag.value)
    except ValueError:
        raise UserError(f"--{flag.name} wants numbers separated by commas, got {','.join(flag.value)!r}") from None


class _NumberOrAuto(flags.ArgumentParser):
    syntactic_help = 'a number, or "auto"'

    def parse(self, argument: str | int) -> str | int:
        try:
            return "auto" if argument == "auto" else int(argument)
        except ValueError:
            raise ValueError(f"{argument!r} is neither a number nor auto") from None

    def flag_type(self) -> str:
        return "number or auto"


def define_number_or_auto(name: str, default: int | None, help: str) -> flags.FlagHolder:
    return flags.DEFINE(_NumberOrAuto(), name, default, help)
