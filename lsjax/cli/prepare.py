"""Tokenizes and packs a corpus for training, on all cores of this machine.

  lsjax prepare --config=pretrain_7b --workdir=runs/7b

The result is the data folder that `lsjax train` finds with the same --config and --workdir: config.data.directory, or
else WORKDIR/data. Training prepares a small corpus by itself. A preparation that was interrupted, by Ctrl-C or in any
other way, goes on where it was when the same command is run again.

An array of jobs on several machines, which share that folder, prepares a large corpus together. Job I of N is:

  lsjax prepare --config=pretrain_7b --workdir=runs/7b --shard=I/N

The last job that ends checks all shards and completes the folder. If a job was lost, run it again, or run the command
without --shard, which packs whatever is missing. The result does not depend on the number of cores or shards.
"""

import os
import re
import signal
from typing import Any

from lsjax.cli.flags import Arguments, CommandFlags
from lsjax.errors import UserError


def define_flags(flags: CommandFlags) -> None:
    """Defines the flags of this command."""
    flags.group("What to prepare")
    flags.config()
    flags.path("workdir", None, "Folder of the run; not needed if config.data.directory is set.")
    flags.group("Several machines")
    flags.text("shard", "1/1", "I/N: pack the I-th of N shares of the corpus, from 1.")


def main(arguments: Arguments) -> int:
    """Runs the command. Returns 128 plus the number of the signal that interrupted it, as shells do."""
    before = {number: signal.signal(number, _end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _prepare(arguments)
        return 0
    except (KeyboardInterrupt, SystemExit) as interrupt:  # while several processes pack
        _say_interrupted()
        return 128 + (signal.SIGINT if isinstance(interrupt, KeyboardInterrupt) else signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: Any) -> None:
    """Ends this process at once. Files appear whole or not at all, so there is nothing to put in order."""
    _say_interrupted()
    os._exit(128 + number)


def _say_interrupted() -> None:
    # Not print, which may be running already.
    os.write(2, b"interrupted: run the same command again to go on from here\n")


def _prepare(arguments: Arguments) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # preparing needs no accelerator, and must not take one
    config = arguments.read_config()
    if not arguments.workdir and not config.data.directory:
        raise UserError("give --workdir or --config.data.directory: nothing says where to write the data")

    from lsjax.data.prepare import Shard, prepare, prepare_shard
    from lsjax.io.workdir import data_directory
    from lsjax.training.start import open_initial_model

    shard = Shard(*_parse_shard(arguments.shard))
    directory = data_directory(arguments.workdir, config)
    initial = open_initial_model(config)
    given = initial.tokenizer if initial else None
    if prepare_shard(config, directory, shard, _say, given):
        prepare(config, directory, _say, given)
        print(f"complete: {directory}")
    else:
        print(f"shard {shard.index} of {shard.count} is done; the last shard that ends completes {directory}")


def _say(text: str) -> None:
    print(text, flush=True)


def _parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= index <= count:
        raise UserError(f"--shard must be I/N with I from 1 to N, such as 1/8, got {text!r}")
    return index, count
