"""A LayerSkip Llama small enough to train on a laptop in minutes, on the interpreter's own standard library."""

from lsjax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 12
    config.model.width = 256
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.feed_forward_width = 704
    config.model.vocab_size = 2048
    config.model.context_length = 512
    config.layerskip.exit_rotation = 11
    config.training.total_steps = 800
    config.training.batch_size = 4
    config.training.learning_rate = 3e-3
    config.training.warmup_steps = 40
    config.training.rematerialize = False
    config.training.loss_chunk = 4096
    config.evaluation.every_steps = 200
    config.checkpoint.every_steps = 200
    return config
