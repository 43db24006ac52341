"""The published shapes of Llamas, for configurations that train one: `config.model.update(LLAMAS[name].to_dict())`."""

from lsjax.config import ModelConfig, RopeScaling

LLAMAS = {
    "llama1_7b": ModelConfig(32, 4096, 32, 32, 128, 11008, 32000, 2048, False, rms_norm_epsilon=1e-6),
    "llama2_7b": ModelConfig(32, 4096, 32, 32, 128, 11008, 32000, 4096, False),
    "llama2_13b": ModelConfig(40, 5120, 40, 40, 128, 13824, 32000, 4096, False),
    "llama2_70b": ModelConfig(80, 8192, 64, 8, 128, 28672, 32000, 4096, False),
    "llama3_8b": ModelConfig(32, 4096, 32, 8, 128, 14336, 128256, 8192, False, 500000.0),
    "llama3_2_1b": ModelConfig(
        *(16, 2048, 32, 8, 64, 8192, 128256, 131072, True, 500000.0),
        rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
    ),
    # The paper's 1.5B (its Table 10): 24 layers of width 2048 with 16 heads; the rest by Llama 2's rules.
    "layerskip_1_5b": ModelConfig(24, 2048, 16, 16, 128, 5632, 32000, 4096, False),
}
