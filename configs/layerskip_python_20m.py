"""Trains python-20m's shape from scratch with LayerSkip, on the tokens that the plain model learned from.

  python examples/python_corpus/build.py --output=runs/python_corpus
  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \\
    python launch/train.py --config=configs/layerskip_python_20m.py --workdir=runs/layerskip_python_20m

The recipe is `drafting` of configs/ablate.py, with exit 4 of 12:
- Layers are dropped for a whole batch at a time, more often in depth, and less and less over the run.
- Exit 4 is on at every step, with 0.3 of the last layer's weight. It alone learns from the last layer's distribution,
  with a weight that grows over the run. The other exits take turns.

Run: 1,100 steps of 4,096 tokens; learning rate 1.5e-3, as in configs/python_20m.py.
Hardware: 2 CPU cores, 6 GB of memory.
Time: two hours beside other work (600 to 900 tokens per second).
Expected: held-out loss 3.60 nats per token at the last layer (3.67 without LayerSkip), 3.69 at exit layer 4 (5.44).
"""

import ml_collections

from lsjax.config import default_config
from lsjax.model.presets import LLAMAS


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.update(LLAMAS["python_20m"].to_dict())

    config.layerskip.dropout_max_rate = 0.2
    config.layerskip.dropout_depth_schedule = "linear"
    config.layerskip.dropout_time_schedule = "linear_decay"
    config.layerskip.dropout_granularity = "batch"
    config.layerskip.dropout_rescale = True
    config.layerskip.exit_curriculum = "rotational"
    config.layerskip.exit_rotation = 11
    config.layerskip.exit_scale = 0.2
    config.layerskip.exit_weight_floor = 0.3
    config.layerskip.draft_exit = 4
    config.layerskip.exit_distillation = 10.0
    config.layerskip.exit_distillation_schedule = "linear"

    # All that follows is as in python_20m.py, so that the two runs can be compared.
    config.data.corpus = "runs/python_corpus/corpus.jsonl"
    config.training.total_steps = 1100
    config.training.batch_size = 8
    config.training.sequence_length = 512
    config.training.learning_rate = 1.5e-3
    config.training.warmup_steps = 100
    config.training.rematerialize = "elementwise"
    config.training.scan_unroll = 12

    config.evaluation.every_steps = 250
    config.evaluation.max_batches = 12
    config.checkpoint.every_steps = 100
    return config
