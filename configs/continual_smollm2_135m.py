"""Continues SmolLM2-135M-Instruct with LayerSkip on Python files, on a laptop.

  make demo-pretrained
  python launch/train.py --config=configs/continual_smollm2_135m.py --workdir=runs/smollm2

Hardware: 2 CPU cores, 4 GB of memory.
Time: 24 minutes.
Expected: held-out loss at exit layers 10, 15, 20, 25 and 30 falls from 23.4, 20.5, 19.7, 9.6 and 2.43 to 7.7, 6.7, 6.3,
  4.1 and 2.31; agreement with the last layer at 10, 15, 20 and 25 rises from 3, 5, 9 and 29 % to 21, 27, 35 and 56 %.
Longer: --config.training.total_steps=1500 --workdir=runs/longer

This is not the paper's recipe but one for a short budget:
- Exits from layer 8 on take turns, five at a step, each on every fourth token.
- Exits learn from the text and from the last layer's distribution, but do not train the shared head. Their weight is
  small beside the last layer's, which they would otherwise harm.
- The embedding, which is also the head, is frozen: few tokens would only add noise to most of its rows.
- There is no layer dropout, which pays off only over many steps.
"""

import ml_collections

from lsjax.config import default_config
from lsjax.model.presets import LLAMAS


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.initial_model = "runs/pretrained/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.model.update(LLAMAS["smollm2_135m"].to_dict())

    config.layerskip.dropout_max_rate = 0.0
    config.layerskip.exit_first = 8
    config.layerskip.exit_scale = 0.0
    config.layerskip.exit_weight_floor = 0.04
    config.layerskip.exit_rotation = 5
    config.layerskip.exit_distillation = 1.0
    config.layerskip.exit_token_stride = 4
    config.layerskip.exits_train_head = False

    config.training.total_steps = 280
    config.training.batch_size = 2
    config.training.sequence_length = 256
    config.training.learning_rate = 3e-4
    config.training.warmup_steps = 10
    config.training.weight_decay = 0.0
    config.training.loss_chunk = 512
    config.training.frozen = "embed"

    config.evaluation.every_steps = 140
    config.evaluation.max_batches = 16
    config.evaluation.exit_stride = 5
    config.checkpoint.every_steps = 140
    return config
