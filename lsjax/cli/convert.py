"""Converts a model of any kind that lsjax reads into a Hugging Face or lsjax folder, or a GGUF file for llama.cpp.

  lsjax convert --from=runs/demo --to=demo-hf --format=huggingface
  lsjax convert --from=SmolLM2-135M-Instruct.Q4_1.gguf --to=smollm2 \\
    --format=lsjax
  lsjax convert --from=runs/demo --to=demo.gguf --format=gguf

transformers loads a Hugging Face folder as any Llama, with assistant_early_exit too. An lsjax folder is what --model
and config.initial_model take (they take the other kinds as well). Weights keep their bits unless
--dtype says otherwise; those of a GGUF file are expanded to float32 first.

A LoRA adapter is merged into its model. --format=peft writes the adapter of a run with LoRA alone, which transformers
with peft and --adapter take.

--format=gguf writes the tokenizer too, which must be byte-level BPE. llama.cpp's own programs quantise the file.
"""

from lsjax.cli import decoding_flags as shared
from lsjax.cli.flags import Arguments, CommandFlags


def define_flags(flags: CommandFlags) -> None:
    """Defines the flags of this command."""
    flags.group("Input")
    flags.path(
        "from",
        None,
        "Training workdir, Hugging Face folder, GGUF file or Hub name: org/name[@revision][:FILE.gguf].",
        required=True,
    )
    shared.define_adapter(flags)
    flags.group("Output")
    flags.path("to", None, "Folder to make; for gguf a file.", required=True)
    flags.choice("format", "huggingface", ["huggingface", "lsjax", "peft", "gguf"], "Format to write.")
    flags.choice(
        "dtype",
        "stored",
        ["stored", "float32", "bfloat16", "float16"],
        'Dtype of the written weights; "stored" keeps each one as it is.',
    )


def main(arguments: Arguments) -> None:
    """Runs the command."""
    import jax

    from lsjax.io.convert import convert

    target = arguments.to
    model = convert(getattr(arguments, "from"), target, arguments.format, arguments.dtype, arguments.adapter)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(model.params)})
    adapter = f", and the adapter of exit {model.exit_adapter.exit_layer}" if model.exit_adapter else ""
    print(f"{target}: {parameters:,} parameters, {', '.join(dtypes)}, {arguments.format}{adapter}")
