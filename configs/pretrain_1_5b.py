"""A 1.5B Llama from scratch with LayerSkip: the paper's first pretraining run (arXiv 2404.16710, section 5 and Tables
8-10).

26B tokens: 4 sequences a GPU on 32 GPUs for 50,000 steps. Learning rate 8e-4 (4e-4 is its rate without LayerSkip).
Expected: CNN/DM: self-speculation at exit layer 8 1.76 times faster, 77 % of drafts accepted (its Table 4).
Not in the paper, chosen here: feed-forward width and vocabulary (here by Llama 2's rules), the corpus, optimizer
betas, weight decay, warm-up, decay schedule, clipping and number types.

  python launch/train.py --config=configs/pretrain_1_5b.py --workdir=runs/pretrain_1_5b

Compiled ahead of time (launch/compile_ahead.py; the bounds are of peak rates, not measurements;
on GPU with the attention of cuDNN):
  gpu:a100-80:4x8 train: fits, 22.3 of 72.9 GiB; bound by matmul, 0.511 s; MFU bound 105% (causal 93%)
  tpu:v5p:2x4x4 train: fits, 24.1 of 95.7 GiB; bound by matmul, 0.347 s; MFU bound 105% (causal 93%)
"""

import ml_collections

from lsjax import default_config
from lsjax.model.shapes import LLAMAS


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
