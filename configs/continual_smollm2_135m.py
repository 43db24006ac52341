"""SmolLM2-135M-Instruct continued with LayerSkip on Python files, in 20 minutes on a laptop.

  make demo-pretrained
  python launch/train.py --config=configs/continual_smollm2_135m.py --workdir=runs/smollm2

Hardware: 2 CPU cores, 4 GB of memory. Expected, in 24 minutes: held-out loss at layers 10, 15, 20, 25 and 30 from 23.4,
20.5, 19.7, 9.6 and 2.43 to 7.7, 6.7, 6.3, 4.1 and 2.31; agreement with the last layer at 10 to 25 from 3, 5, 9 and 29 %
to 21, 27, 35 and 56 %. Longer: --config.training.total_steps=1500 --workdir=runs/longer.

Not the paper's recipe but one for a short budget. Exits from layer 8 on take turns, five at a step, each on every
fourth token; they learn from the text and from the last layer's own distribution, but do not pull on the shared head,
and their weight is small beside the last layer's, which they would otherwise harm. The embedding, which is also the
head, is frozen: so few tokens would only add noise to most of its rows. No layer dropout: that pays over many steps.
"""

from lsjax.config import default_config


def get_config():
    config = default_config()
    config.initial_model = "runs/pretrained/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.model.num_layers = 30
    config.model.width = 576
    config.model.num_heads = 9
    config.model.num_kv_heads = 3
    config.model.head_width = 64
    config.model.feed_forward_width = 1536
    config.model.vocab_size = 49152
    config.model.context_length = 8192
    config.model.tie_embeddings = True
    config.model.rope_theta = 100000.0
    config.model.rms_norm_epsilon = 1e-5

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
