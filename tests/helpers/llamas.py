"""Makes small random Llamas with transformers, one for each variant of the architecture that lsjax reads."""

from pathlib import Path

import tokenizers
import torch
import transformers

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# What differs from the base in `make_llama`. `shard` is the size of one weights file.
VARIANTS = {
    "llama1": {"rms_norm_eps": 1e-6},
    "llama2_70b": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "multi_query": {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 48},
    "llama3": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "llama31": {"num_key_value_heads": 2, "rope_parameters": LLAMA3},
    "llama32": {"num_key_value_heads": 2, "rope_parameters": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True},
    "linear_scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "wide_heads": {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    "narrow_heads": {"head_dim": 4, "num_attention_heads": 4, "num_key_value_heads": 4},
    "odd_widths": {"intermediate_size": 77, "vocab_size": 301, "hidden_size": 36, "head_dim": 10},
    "large_epsilon": {"rms_norm_eps": 1e-2, "tie_word_embeddings": True},
    "smollm2": {
        "hidden_size": 36,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
    # The layouts of the released LayerSkip folders, narrow.
    "layerskip_llama32_1b": {
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3 | {"factor": 32.0},
        "eos_token_id": [2, 3],
    },
    "layerskip_llama2_7b": {"num_hidden_layers": 32, "shard": "100KB"},
}


def make_llama(folder: Path, variant: str, seed: int = 0) -> transformers.LlamaForCausalLM:
    """Returns a random model that transformers saved to `folder`, with weights so large that every part matters."""
    settings = dict(VARIANTS[variant])
    shard = settings.pop("shard", "5GB")
    base = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 288,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**base | settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn_like(parameter)
            # A tied head over large embeddings would repeat one token forever.
            embedding = model.config.tie_word_embeddings and "embed" in name
            parameter.copy_(1 + noise if parameter.ndim == 1 else noise / 3 if embedding else noise)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return model


def write_tokenizer(folder: Path) -> None:
    """Saves a tokenizer of bytes and a few special tokens, smaller than any embedding here."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<unk>", "<s>", "</s>", "<eot>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["def main(): return 0"], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(folder)


@torch.no_grad()
def run_llama(model, tokens) -> tuple:
    """Returns a transformers model's logits [B,S,V] and the state after each layer [L,B,S,D], before the final norm."""
    states = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]
    logits = model(torch.as_tensor(tokens)).logits
    for hook in hooks:
        hook.remove()
    return logits.numpy(), torch.stack(states).numpy()
