"""Compares LayerSkip recipes at a laptop's size: 8 layers, 6 million parameters, Python's standard library.

  python launch/ablate.py --config=configs/ablate.py --workdir=runs/ablate

Run: 16 recipes of 400 steps each. Each recipe sets `config.layerskip` itself (lsjax/experiments/ablation/recipes.py).
Hardware: 2 CPU cores.
Expected: the last layer without LayerSkip ends at 4.22 +- 0.08 nats per token on held-out text (three seeds).
"""

import ml_collections

from lsjax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.num_layers = 8
    config.model.width = 256
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.feed_forward_width = 704
    config.model.vocab_size = 1024
    config.model.context_length = 256

    config.training.total_steps = 400
    config.training.batch_size = 8
    config.training.sequence_length = 128
    config.training.learning_rate = 2e-3
    config.training.warmup_steps = 40

    config.evaluation.every_steps = 50
    config.evaluation.max_batches = 16
    config.checkpoint.every_steps = 200
    config.checkpoint.keep = 1
    return config
