"""Continues Llama 2 13B with LayerSkip (arXiv 2404.16710, section 5 and Tables 8-10).

  python launch/train.py --config=configs/continual_llama2_13b.py --workdir=runs/continual_llama2_13b

Run: 52B tokens in 50,000 steps; 4 sequences per GPU; learning rate 2e-5; R = L - 1, so one early exit trains at each
  step.
Hardware: 64 A100 80 GB.
Time: at least 70 hours on that hardware (50,000 times the compiled bound below).
Expected: on CNN/DM, self-speculation at exit layer 15 with 12 drafts is 1.81 times faster and accepts 75 % of drafts
  (the paper's Table 3).
Not in the paper, chosen here: the corpus, optimizer betas, weight decay, warm-up, decay schedule, clipping and number
  types.

Compiled ahead of time by launch/compile_ahead.py. The bounds follow from peak rates and are not measurements;
GPU figures use cuDNN attention:
  gpu:a100-80:8x8 train: fits, 56.2 of 72.9 GiB; bound by matmul, 5.02 s; MFU bound 91% (causal 86%)
  tpu:v5p:4x4x4 train: fits, 65.4 of 95.7 GiB; bound by matmul, 3.41 s; MFU bound 91% (causal 86%)
"""

import ml_collections

from lsjax import default_config
from lsjax.model.presets import LLAMAS


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.update(LLAMAS["llama2_13b"].to_dict())
    config.initial_model = "models/Llama-2-13b-hf"
    config.data.corpus = "data/pretraining"
    config.layerskip.update(dropout_max_rate=0.1, exit_scale=0.1, exit_rotation=39)
    config.training.update(total_steps=50_000, batch_size=256, sequence_length=4096)
    config.training.update(learning_rate=2e-5, warmup_steps=500, rematerialize="feed_forward", loss_chunk=2048)
    config.training.log_every_steps = 20
    config.mesh.update(data=-1, fsdp=16)
    config.checkpoint.update(every_steps=1000, keep=3)
    config.evaluation.update(every_steps=1000, exit_stride=4)
    return config
