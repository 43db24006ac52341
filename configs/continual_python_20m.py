"""Continues python-20m, which ships, with LayerSkip on its own training text, and leaves its last layer as good.

  python examples/python_corpus/build.py --output=runs/python_corpus
  python launch/train.py --config=configs/continual_python_20m.py --workdir=runs/continual_python_20m

Run: 700 steps of 4,096 tokens, other rows of the corpus than the shipped model saw first; learning rate 1e-3.
Hardware: 2 CPU cores, 6 GB of memory.
Time: under 2 hours on one core, beside other programs.
Expected: held-out loss 3.69 nats per token at exit layer 4 (5.44 before), 3.17 at the last layer (3.67 before).
Control: the same text without LayerSkip, with --config.layerskip.draft_exit=0 --config.layerskip.exit_distillation=0
  --config.layerskip.exit_weight_floor=0 and another --workdir, has a last layer of 3.13.

The exit learns mostly from the last layer's distribution, and a little from the text. The demo trains the same exit
with a larger weight, which drafts better after few steps and costs the last layer more (docs/results.md, "What drafting
costs the last layer").
"""

import ml_collections

from lsjax.config import default_config
from lsjax.model.presets import LLAMAS


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.initial_model = "python-20m"
    config.model.update(LLAMAS["python_20m"].to_dict())

    config.layerskip.dropout_max_rate = 0.0
    config.layerskip.exit_curriculum = "none"
    config.layerskip.exit_scale = 0.0
    config.layerskip.exit_weight_floor = 0.1
    config.layerskip.draft_exit = 4
    config.layerskip.exit_distillation = 5.0
    config.layerskip.exits_train_head = False

    config.data.corpus = "runs/python_corpus/corpus.jsonl"
    config.training.total_steps = 700
    config.training.batch_size = 8
    config.training.sequence_length = 512
    config.training.learning_rate = 1e-3
    config.training.warmup_steps = 30
    config.training.rematerialize = "elementwise"
    config.training.scan_unroll = 12
    config.training.seed = 2

    config.evaluation.every_steps = 175
    config.evaluation.max_batches = 12
    config.checkpoint.every_steps = 50
    return config
