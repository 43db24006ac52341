"""Trains Llama 2 70B from scratch with LayerSkip. The paper has no such run; this size checks that the sharding holds.

  python launch/train.py --config=configs/pretrain_70b.py --workdir=runs/pretrain_70b

Run: 26B tokens, as for the smaller models, in 6,250 steps of 1,024 sequences.
Hardware: compiled here for 256 A100 80 GB and for 256 TPU v5p chips.
Time: at least 49 hours on 256 A100 (6,250 times the compiled bound below).
Expected: nothing published.
Not in the paper, chosen here: everything except the recipe, which is that of pretrain_7b.

Compiled ahead of time by launch/compile_ahead.py. The bounds follow from peak rates and are not measurements;
GPU figures use cuDNN attention:
  gpu:a100-80:32x8 train: fits, 47.5 of 72.9 GiB; bound by matmul, 28.2 s; MFU bound 83% (causal 80%)
  tpu:v5p:4x8x8 train: fits, 54.9 of 95.7 GiB; bound by matmul, 19.2 s; MFU bound 83% (causal 80%)
"""

import ml_collections

from lsjax import default_config
from lsjax.model.presets import LLAMAS


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.update(LLAMAS["llama2_70b"].to_dict())
    config.data.corpus = "data/pretraining"
    config.layerskip.update(dropout_max_rate=0.2, dropout_time_schedule="exponential", exit_scale=0.2, exit_rotation=79)
    config.training.update(total_steps=6_250, batch_size=1024, sequence_length=4096)
    config.training.update(learning_rate=1.5e-4, warmup_steps=500, rematerialize="layer", loss_chunk=1024)
    config.training.log_every_steps = 20
    config.mesh.update(data=-1, fsdp=64)
    config.checkpoint.update(every_steps=1000, keep=3)
    config.evaluation.update(every_steps=1000, exit_stride=4)
    return config
