"""Continues Llama 3 8B with LayerSkip (arXiv 2404.16710, section 5 and Table 2).

  python launch/train.py --config=configs/continual_llama3_8b.py --workdir=runs/continual_llama3_8b

Run: 419B tokens, here in 100,000 steps of 1,024 sequences. The paper gives only the tokens, p_max, e_scale and R.
Hardware: not in the paper; compiled here for 64 A100 80 GB and for 64 TPU v5p chips.
Time: at least 381 hours on 64 A100 (100,000 times the compiled bound below).
Expected: WikiText perplexity is 5.38 at the last layer (5.63 before) and 12.2 at the middle layer; MMLU falls from
  66.5 to 60.5 and HumanEval from 37.8 to 28.7 (the paper's Table 2). exit_weight_floor, exit_first and
  exits_train_head exist to lessen this damage.
Not in the paper, chosen here: steps, batch, sequence length, learning rate (3e-5, as for Llama 2 7B), hardware, the
  corpus, optimizer betas, weight decay, warm-up, decay schedule, clipping and number types.

Compiled ahead of time by launch/compile_ahead.py. The bounds follow from peak rates and are not measurements;
GPU figures use cuDNN attention:
  gpu:a100-80:8x8 train: fits, 66.1 of 72.9 GiB; bound by matmul, 13.7 s; MFU bound 79% (causal 74%)
  tpu:v5p:4x4x4 train: fits, 72.1 of 95.7 GiB; bound by matmul, 9.29 s; MFU bound 79% (causal 74%)
"""

import ml_collections

from lsjax import default_config
from lsjax.model.presets import LLAMAS


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.update(LLAMAS["llama3_8b"].to_dict())
    config.initial_model = "models/Meta-Llama-3-8B"
    config.data.corpus = "data/pretraining"
    config.layerskip.update(dropout_max_rate=0.1, exit_scale=0.1, exit_rotation=8)
    config.training.update(total_steps=100_000, batch_size=1024, sequence_length=4096, gradient_accumulation=4)
    config.training.update(learning_rate=3e-5, warmup_steps=1000, rematerialize="elementwise", loss_chunk=1024)
    config.training.log_every_steps = 20
    config.mesh.update(data=-1, fsdp=16)
    config.checkpoint.update(every_steps=1000, keep=3)
    config.evaluation.update(every_steps=1000, exit_stride=4)
    return config
