"""Trains a small LayerSkip Llama from scratch on a laptop, on the interpreter's own standard library.

  python launch/train.py --config=configs/scratch.py --workdir=runs/scratch

Hardware: 2 CPU cores.
Time: 4 minutes.
Expected: held-out loss 4.11 nats per token at the last layer and 4.27 at the first. After so few minutes the late
  layers add almost nothing; `make demo` begins with a model that has learned more.

This is not the paper's recipe but one for a short budget:
- Layers are dropped for a whole batch at a time, linearly in depth, so that their compute is really saved.
- Exits take turns, and each has a real share of the loss.
- Exit layer 2, which drafts best, trains at every step. It alone learns from the last layer's distribution, with a
  weight that grows over the run.
- The weights do not fit a processor's cache, so decoding costs what reading them costs, as for any larger model.
"""

import ml_collections

from lsjax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.num_layers = 12
    config.model.width = 384
    config.model.num_heads = 6
    config.model.num_kv_heads = 2
    config.model.feed_forward_width = 1024
    config.model.vocab_size = 1024
    config.model.context_length = 256

    config.layerskip.dropout_max_rate = 0.5
    config.layerskip.dropout_depth_schedule = "linear"
    config.layerskip.dropout_granularity = "batch"
    config.layerskip.exit_scale = 1.0
    config.layerskip.exit_rotation = 4
    config.layerskip.exit_weight_floor = 0.3
    config.layerskip.draft_exit = 2
    config.layerskip.exit_distillation = 20.0
    config.layerskip.exit_distillation_schedule = "linear"

    config.training.total_steps = 400
    config.training.batch_size = 8
    config.training.sequence_length = 128
    config.training.learning_rate = 1.5e-3
    config.training.warmup_steps = 40
    config.training.rematerialize = "elementwise"

    config.evaluation.every_steps = 200
    config.evaluation.max_batches = 16
    config.checkpoint.every_steps = 200
    return config
