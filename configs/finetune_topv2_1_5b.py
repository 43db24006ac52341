"""Fine-tunes the 1.5B model of pretrain_1_5b on TOPv2 with LayerSkip (arXiv 2404.16710, section 5, Tables 8-10).

  python launch/train.py --config=configs/finetune_topv2_1_5b.py --workdir=runs/finetune_topv2_1_5b

Run: 5,800 steps; 32 sequences per GPU; learning rate 1e-4; exits are switched on gradually.
Hardware: 8 A100 80 GB.
Time: at least 12.3 hours on that hardware (5,800 times the compiled bound below).
Expected: exact match 82.9 % (85.9 % without LayerSkip); self-speculation at exit layer 6 is 2.0 times faster and
  accepts 76 % of drafts (the paper's Table 6).
Data: data/topv2.jsonl, each line {"prompt": utterance, "completion": parse}.
Not in the paper, chosen here: only parses are learned, how examples are packed (here to 4,096 tokens), optimizer betas,
  weight decay, warm-up, decay schedule, clipping and number types.

Compiled ahead of time by launch/compile_ahead.py. The bounds follow from peak rates and are not measurements;
GPU figures use cuDNN attention:
  gpu:a100-80:1x8 train: fits, 23.2 of 72.9 GiB; bound by matmul, 7.63 s; MFU bound 56% (causal 50%)
  tpu:v5p:2x2x2 train: fits, 26.9 of 95.7 GiB; bound by matmul, 5.19 s; MFU bound 56% (causal 50%)
"""

import ml_collections

from lsjax import default_config
from lsjax.model.presets import LLAMAS


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.update(LLAMAS["layerskip_1_5b"].to_dict())
    config.initial_model = "runs/pretrain_1_5b"
    config.data.update(corpus="data/topv2.jsonl", format="completion")
    config.layerskip.update(dropout_max_rate=0.2, exit_scale=1.0, exit_curriculum="gradual")
    config.training.update(total_steps=5_800, batch_size=256, sequence_length=4096, gradient_accumulation=8)
    config.training.update(learning_rate=1e-4, warmup_steps=100, rematerialize="elementwise", loss_chunk=2048)
    config.training.log_every_steps = 20
    config.mesh.update(data=-1, fsdp=8)
    config.checkpoint.update(every_steps=1000, keep=3)
    config.evaluation.update(every_steps=1000, exit_stride=4)
    return config
