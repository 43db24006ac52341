"""Trains Llama 2 7B from scratch with LayerSkip: the paper's second pretraining run (arXiv 2404.16710, Tables 8-10).

  python launch/train.py --config=configs/pretrain_7b.py --workdir=runs/pretrain_7b

Run: 26B tokens in 50,000 steps; 4 sequences per GPU; learning rate 8e-4 (3e-4 is the paper's rate without LayerSkip).
Hardware: 32 GPUs.
Time: at least 32 hours on 32 A100 80 GB (50,000 times the compiled bound below).
Expected: on CNN/DM, self-speculation at exit layer 8 is 2.16 times faster and accepts 78 % of drafts (the paper's
  Table 4).
Not in the paper, chosen here: feed-forward width, vocabulary (Llama 2's own), heads (the 16 in the paper's Table 10
  are taken for a misprint of 32), the corpus, optimizer betas, weight decay, warm-up, decay schedule, clipping and
  number types.

Compiled ahead of time by launch/compile_ahead.py. The bounds follow from peak rates and are not measurements;
GPU figures use cuDNN attention:
  gpu:a100-80:4x8 train: fits, 56.3 of 72.9 GiB; bound by matmul, 2.33 s; MFU bound 104% (causal 96%)
  gpu:h100:8x8 train: fits, 32.3 of 72.8 GiB; bound by matmul, 0.368 s; MFU bound 104% (causal 96%)
  tpu:v5p:2x4x4 train: fits, 61.7 of 95.7 GiB; bound by matmul, 1.59 s; MFU bound 104% (causal 96%)
  tpu:v5p:4x4x4 train: fits, 34.6 of 95.7 GiB; bound by matmul, 0.793 s; MFU bound 104% (causal 96%)
"""

import ml_collections

from lsjax import default_config
from lsjax.model.presets import LLAMAS


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.update(LLAMAS["llama2_7b"].to_dict())
    config.data.corpus = "data/pretraining"
    config.layerskip.update(dropout_max_rate=0.2, dropout_time_schedule="exponential", exit_scale=0.2, exit_rotation=31)
    config.training.update(total_steps=50_000, batch_size=128, sequence_length=4096)
    config.training.update(learning_rate=8e-4, warmup_steps=2000, rematerialize="elementwise", loss_chunk=2048)
    config.training.log_every_steps = 20
    config.mesh.update(data=-1, fsdp=16)
    config.checkpoint.update(every_steps=1000, keep=3)
    config.evaluation.update(every_steps=1000, exit_stride=4)
    return config
