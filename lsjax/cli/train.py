"""Trains a Llama with LayerSkip: layer dropout and early-exit loss (arXiv 2404.16710).

  lsjax train --config=demo --workdir=runs/demo

Any key of the configuration can be set on the command line:

  lsjax train --config=scratch --workdir=runs/wide \\
    --config.model.width=512

The same command resumes from the latest checkpoint in the workdir. Ctrl-C saves first. The workdir then holds
checkpoints/, metrics.jsonl, evaluations.jsonl, tensorboard/, config.json and tokenizer.json, and is what --model of the
other commands takes.

On several hosts, run the same command on each of them, with a workdir that all of them can write: with --distributed
where SLURM, Kubernetes or Cloud TPU says which hosts there are, else with --coordinator, --num_processes and
--process_id.
"""

import os

from lsjax.cli.flags import Arguments, CommandFlags
from lsjax.errors import UserError


def define_flags(flags: CommandFlags) -> None:
    """Defines the flags of this command."""
    flags.group("What to train")
    flags.config()
    flags.path("workdir", None, "Folder of the run; created, or resumed from.", required=True)
    flags.group("Several hosts")
    flags.switch("distributed", "Join the other hosts that SLURM, Kubernetes or Cloud TPU names.")
    flags.text("coordinator", "", "HOST:PORT of process 0, to join the other processes by hand.")
    flags.integer("num_processes", None, "With --coordinator: how many processes there are.")
    flags.integer("process_id", None, "With --coordinator: which of them this is, from 0.")
    flags.group("Measuring")
    flags.integer(
        "profile", 0, "Trace this many steps into WORKDIR/profile, for TensorBoard or ui.perfetto.dev.", at_least=0
    )


def main(arguments: Arguments) -> int:
    """Runs the command. Returns 128 plus the number of the signal that interrupted it, as shells do."""
    # XLA takes 75 % of a GPU's memory by default; compile_ahead calculates with this share.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    config = arguments.read_config()
    if not arguments.coordinator and (arguments.num_processes, arguments.process_id) != (None, None):
        raise UserError("--num_processes and --process_id go with --coordinator=HOST:PORT")
    if arguments.coordinator and arguments.distributed:
        raise UserError("--distributed finds the other hosts by itself: give it or --coordinator, not both")
    if arguments.distributed or arguments.coordinator:
        from lsjax.parallel import distributed

        distributed.join(arguments.coordinator, arguments.num_processes, arguments.process_id)

    from lsjax.training.loop import train

    result = train(config, arguments.workdir, profile_steps=arguments.profile)
    return 128 + result.interrupted if result.interrupted else 0
