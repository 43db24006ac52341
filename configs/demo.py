"""Continues a small model with LayerSkip on a laptop, on the interpreter's own standard library.

  make demo
  python launch/demo.py --config=configs/demo.py --workdir=runs/demo

Hardware: 2 CPU cores.
Time: 10 minutes in all, 5 of them training.
Expected: exit layer 4 goes from a held-out loss of 5.78 to 4.28 nats per token, the last layer from 4.07 to 3.96.
  Sampling, 52 % of 3 drafts are accepted instead of 18 %; greedy, 62 % of 2 drafts instead of 12 %.

The model is `python-20m`, which ships: 12 layers, trained on Python source without LayerSkip. It has not seen the
standard library. This is not the paper's recipe but one for a short budget:
- Exit layer 4, which drafts, trains at every step, with the weight of the last layer, and learns from the last layer's
  distribution too. It is the only early exit.
- It does not train the shared head, which the last layer would pay for.
- There is no layer dropout, which pays off only over many steps.
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
    config.layerskip.exit_weight_floor = 1.0
    config.layerskip.draft_exit = 4
    config.layerskip.exit_distillation = 4.0
    config.layerskip.exits_train_head = False

    config.training.total_steps = 100
    config.training.batch_size = 8
    config.training.sequence_length = 512
    config.training.learning_rate = 1e-3
    config.training.warmup_steps = 10
    config.training.rematerialize = "elementwise"
    config.training.scan_unroll = 12

    config.evaluation.every_steps = 50
    config.evaluation.max_batches = 12
    config.checkpoint.every_steps = 50
    return config
