"""Trains a 1.5B Llama from scratch with LayerSkip: the paper's first pretraining run (arXiv 2404.16710, Tables 8-10).

  python launch/train.py --config=configs/pretrain_1_5b.py --workdir=runs/pretrain_1_5b

Run: 26B tokens in 50,000 steps; 4 sequences per GPU; learning rate 8e-4 (4e-4 is the paper's rate without LayerSkip).
Hardware: 32 GPUs.
Time: at least 7.1 hours on 32 A100 80 GB (50,000 times the compiled bound below).
Expected: on CNN/DM, self-speculation at exit layer 8 is 1.76 times faster and accepts 77 % of drafts (the paper's
  Table 4).
Not in the paper, chosen here: feed-forward width and vocabulary (both by Llama 2's rules), the corpus, optimizer
  betas, weight decay, warm-up, decay schedule, clipping and number types.

Compiled ahead of time by launch/compile_ahead.py. The bounds follow from peak rates and are not measurements;
GPU figures use cuDNN attention:
  gpu:a100-80:4x8 train: fits, 22.3 of 72.9 GiB; bound by matmul, 0.511 s; MFU bound 105% (causal 93%)
  tpu:v5p:2x4x4 train: fits, 24.1 of 95.7 GiB; bound by matmul, 0.347 s; MFU bound 105% (causal 93%)
"""

import ml_collections

from lsjax import default_config
from lsjax.model.presets import LLAMAS


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.update(LLAMAS["layerskip_1_5b"].to_dict())
    config.data.corpus = "data/pretraining"
    config.layerskip.update(dropout_max_rate=0.1, dropout_time_schedule="exponential", exit_scale=0.2, exit_rotation=23)
    config.training.update(total_steps=50_000, batch_size=128, sequence_length=4096)
    config.training.update(learning_rate=8e-4, warmup_steps=2000, rematerialize="elementwise", loss_chunk=2048)
    config.training.log_every_steps = 20
    config.mesh.update(data=-1, fsdp=8)
    config.checkpoint.update(every_steps=1000, keep=3)
    config.evaluation.update(every_steps=1000, exit_stride=4)
    return config
