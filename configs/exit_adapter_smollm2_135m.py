"""Trains an adapter of exit layer 10 for SmolLM2-135M-Instruct on Python files, on a laptop. The model stays as it is.

  python launch/demo_pretrained.py --config=configs/exit_adapter_smollm2_135m.py --workdir=runs/exit_adapter

Hardware: 2 CPU cores, 4 GB of memory.
Time: not measured yet, for 1,024,000 tokens.
Expected: not measured yet: held-out loss and agreement with the last layer at exit layer 10, before and after. All
  other exits and the last layer keep their loss.
Longer: --config.training.total_steps=10000 --workdir=runs/longer

The adapter is one matrix of 576 x 576 numbers, 1.3 MB, between the state after layer 10 and the shared norm and head.
Only drafts and early exits at that layer go through it.
- It learns from the last layer's distribution alone, so it needs no text of the kind that the model was trained on.
- Every second token is enough: the layers run over all tokens, but the two heads, a third of the work, only over these.
- The adapter starts as no change at all, and few numbers learn, so the learning rate is that of a small model.
"""

import ml_collections

from lsjax.config import default_config
from lsjax.model.presets import LLAMAS


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.initial_model = "runs/pretrained/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.model.update(LLAMAS["smollm2_135m"].to_dict())

    config.layerskip.exit_adapter = "linear"
    config.layerskip.draft_exit = 10
    config.layerskip.exit_token_stride = 2
    config.layerskip.dropout_max_rate = 0.0
    config.layerskip.exit_curriculum = "none"

    config.training.total_steps = 1000
    config.training.batch_size = 4
    config.training.sequence_length = 256
    config.training.learning_rate = 1e-3
    config.training.warmup_steps = 20
    config.training.weight_decay = 0.0
    config.training.loss_chunk = 512

    config.evaluation.every_steps = 250
    config.evaluation.max_batches = 8
    config.evaluation.exit_stride = 10
    config.checkpoint.every_steps = 250
    return config
