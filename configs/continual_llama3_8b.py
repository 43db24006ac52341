"""Llama 3 8B continued with LayerSkip (arXiv 2404.16710, section 5 and Table 2).

419B tokens, which is all that the paper gives beside p_max, e_scale and R: here 100,000 steps of 1,024 sequences.
Expected: WikiText perplexity 5.38 at the last layer (5.63 before), 12.2 at the middle one; MMLU 66.5 -> 60.5,
HumanEval 37.8 -> 28.7 (its Table 2): the damage that exit_weight_floor, exit_first and exits_train_head are there to
lessen.
Not in the paper, chosen here: steps, batch, sequence length, learning rate (3e-5 is that of Llama 2 7B), the
hardware, the corpus, optimizer betas, weight decay, warm-up, decay schedule, clipping and number types.

  python launch/train.py --config=configs/continual_llama3_8b.py --workdir=runs/continual_llama3_8b

Compiled ahead of time (launch/compile_ahead.py; the bounds are of peak rates, not measurements;
on GPU with the attention of cuDNN):
  gpu:a100-80:8x8 train: fits, 66.1 of 72.9 GiB; bound by matmul, 13.7 s; MFU bound 79% (causal 74%)
  tpu:v5p:4x4x4 train: fits, 72.1 of 95.7 GiB; bound by matmul, 9.29 s; MFU bound 79% (causal 74%)
"""

import ml_collections

from lsjax import default_config
from lsjax.model.shapes import LLAMAS


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
