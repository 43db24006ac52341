"""Fine-tunes Llama 1 7B on code with LayerSkip (arXiv 2404.16710, section 5 and Tables 8-10).

  python launch/train.py --config=configs/finetune_code_7b.py --workdir=runs/finetune_code_7b

Run: 5.2B tokens in 10,000 steps; 4 sequences per GPU; learning rate 1e-4. The paper's Table 10 says 2,048 tokens of
  context, but its token count follows from 4,096: here 4,096.
Hardware: 32 A100 80 GB.
Time: at least 6.6 hours on that hardware (10,000 times the compiled bound below).
Expected: on HumanEval, self-speculation at exit layer 6 with 12 drafts is 1.82 times faster and accepts 45 % of
  drafts (the paper's Table 5).
Not in the paper, chosen here: the data (a mix like Code Llama's), optimizer betas, weight decay, warm-up, decay
  schedule, clipping and number types.

Compiled ahead of time by launch/compile_ahead.py. The bounds follow from peak rates and are not measurements;
GPU figures use cuDNN attention:
  gpu:a100-80:4x8 train: fits, 56.3 of 72.9 GiB; bound by matmul, 2.39 s; MFU bound 101% (causal 94%)
  tpu:v5p:2x4x4 train: fits, 61.7 of 95.7 GiB; bound by matmul, 1.62 s; MFU bound 101% (causal 94%)
"""

import ml_collections

from lsjax import default_config
from lsjax.model.presets import LLAMAS


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.update(LLAMAS["llama1_7b"].to_dict())
    config.model.context_length = 4096
    config.initial_model = "models/llama-7b"
    config.data.corpus = "data/code"
    config.layerskip.update(dropout_max_rate=0.1, exit_scale=1.0, exit_rotation=16)
    config.training.update(total_steps=10_000, batch_size=128, sequence_length=4096)
    config.training.update(learning_rate=1e-4, warmup_steps=200, rematerialize="elementwise", loss_chunk=2048)
    config.training.log_every_steps = 20
    config.mesh.update(data=-1, fsdp=16)
    config.checkpoint.update(every_steps=1000, keep=3)
    config.evaluation.update(every_steps=1000, exit_stride=4)
    return config
