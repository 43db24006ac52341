"""A small LayerSkip Llama, trained on a laptop in minutes on the interpreter's own standard library.

  make demo
  python launch/demo.py --config=configs/demo.py --workdir=runs/demo

Hardware: 2 CPU cores. Expected: about 8 minutes in all; held-out loss 4.11 nats a token at the last layer and 4.27 at
the first; self-speculation 2.8 times as fast as autoregressive, 3.1 where drafts are also copied from the text.

Not the paper's recipe but a short-budget one: layers are dropped a batch at a time, linearly in depth, so that their
compute is really saved; every exit in its turn gets a real share of the loss; and the one that drafts best, of layer 2,
is on at every step and learns from the last layer's own distribution, the more the longer training goes on. Wide enough
that its weights do not fit a processor's cache: reading them is then what decoding costs, as on any larger model.
"""

from lsjax.config import default_config


def get_config():
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
