from lsjax.config import default_config
from lsjax.loading import read_model_config

MODEL = "runs/pretrained/SmolLM2-135M-Instruct.Q4_1.gguf"


def get_config():
    config = default_config()
    config.initial_model = MODEL
    config.model.update(read_model_config(MODEL).to_dict())

    config.layerskip.dropout_max_rate = 0.0
    config.layerskip.exit_scale = 1.0
    config.layerskip.exit_rotation = 5
    config.layerskip.exit_weight_floor = 0.3
    config.layerskip.exit_distillation = 3.0
    config.layerskip.exit_token_stride = 4
    config.layerskip.exits_train_head = False

    config.training.total_steps = 60
    config.training.batch_size = 2
    config.training.sequence_length = 256
    config.training.learning_rate = 3e-4
    config.training.final_learning_rate_fraction = 0.1
    config.training.warmup_steps = 10
    config.training.weight_decay = 0.0
    config.training.loss_chunk = 512

    config.evaluation.every_steps = 1000
    config.evaluation.max_batches = 8
    config.evaluation.exit_stride = 5
    config.checkpoint.every_steps = 1000
    return config
