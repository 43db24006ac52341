"""Trains a Llama with LayerSkip: layer dropout and early-exit loss (arXiv 2404.16710).

  python launch/train.py --config=configs/demo.py --workdir=runs/demo

Any key of the configuration can be set on the command line:

  python launch/train.py --config=configs/demo.py --workdir=runs/wide --config.model.width=512

On several hosts, the same command on each (one that all can write holds the workdir): --distributed where SLURM,
Kubernetes or Cloud TPU says who they are, else --coordinator, --num_processes and --process_id.

The same command resumes from the latest checkpoint in the workdir; Ctrl-C saves first. The workdir then holds
checkpoints/, metrics.jsonl, evaluations.jsonl, tensorboard/, config.json and tokenizer.json, and is what
launch/decode.py --model= takes.
"""

import os

from absl import flags
from ml_collections import config_flags

from lsjax import commands
from lsjax.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, such as configs/demo.py.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; created, or resumed from.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other hosts that SLURM, Kubernetes or Cloud TPU names.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, to join the other processes by hand.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which of them this is, from 0.")
PROFILE = flags.DEFINE_integer(
    "profile", 0, "Trace so many steps into WORKDIR/profile, for TensorBoard or ui.perfetto.dev.", lower_bound=0
)
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    # Of a GPU's memory, XLA takes 75 % unless told so; compile_ahead reckons with this share.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    config = commands.read_config(CONFIG)
    if not COORDINATOR.value and (NUM_PROCESSES.value, PROCESS_ID.value) != (None, None):
        raise UserError("--num_processes and --process_id go with --coordinator=HOST:PORT")
    if DISTRIBUTED.value or COORDINATOR.value:
        from lsjax.scale import hosts

        hosts.join(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)

    from lsjax.training.loop import train

    train(config, WORKDIR.value, profile_steps=PROFILE.value)


if __name__ == "__main__":
    commands.run(main)
