"""Converts a model: a training workdir, Hugging Face folder or GGUF file into a Hugging Face or lsjax folder.

  python launch/convert.py --from=runs/demo --to=demo-hf --format=huggingface
  python launch/convert.py --from=SmolLM2-135M-Instruct.Q4_1.gguf --to=smollm2 --format=lsjax

transformers loads a Hugging Face folder as any Llama, with assistant_early_exit too. An lsjax folder is what --model
and config.initial_model take (they take Hugging Face folders and GGUF files as well). Weights keep their bits unless
--dtype says otherwise; those of a GGUF file are expanded to float32 first.
"""

from absl import flags

from lsjax import commands

FROM = flags.DEFINE_string("from", None, "Training workdir, Hugging Face folder or GGUF file.", required=True)
TO = flags.DEFINE_string("to", None, "Folder to make.", required=True)
FORMAT = flags.DEFINE_enum("format", "huggingface", ["huggingface", "lsjax"], "What to write.")
DTYPE = flags.DEFINE_enum(
    "dtype", "stored", ["stored", "float32", "bfloat16", "float16"], 'Of the weights; "stored" keeps what there is.'
)


def main() -> None:
    import jax

    from lsjax.convert import convert
    from lsjax.model.transformer import count_params

    model = convert(FROM.value, TO.value, FORMAT.value, DTYPE.value)
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(model.params)})
    print(f"{TO.value}: {count_params(model.config):,} parameters, {', '.join(dtypes)}, {FORMAT.value}")


if __name__ == "__main__":
    commands.run(main)
