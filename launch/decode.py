"""Decodes with a trained model and reports speed: autoregressive, early exit, self-speculative.

On text that the run held out, or on a prompt of yours:

  python launch/decode.py --model=runs/demo --exit_layer=2 --num_speculations=4 --report=report.json
  python launch/decode.py --model=runs/demo --prompt="def main():"
  python launch/decode.py --model=SmolLM2-135M-Instruct.Q4_1.gguf --chat --prompt="What is the capital of France?"
  python launch/decode.py --model=runs/demo --prompt="import os" --temperature=0.8 --top_p=0.95 --seed=1
  python launch/decode.py --model=runs/demo --compare=transformers
  python launch/decode.py --model=runs/demo --prompt="def main():" --stop="class " --stop=$'\n\n'

Times never include compilation, repeats of the strategies are interleaved, and speeds are medians over the
prompts. `speed-up` is against this run's own autoregressive decoding of the same prompts, and "same tokens" says
whether the tokens are exactly its tokens: always so for greedy self_speculative in float32.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lsjax import commands
from lsjax.errors import UserError

NAMES = ("autoregressive", "early_exit", "self_speculative")
MODEL = flags.DEFINE_string("model", None, "Training workdir, Hugging Face folder or GGUF file.", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "One prompt; its continuations are printed.")
PROMPTS = flags.DEFINE_string("prompts", None, 'A .jsonl file of {"prompt": TEXT} lines.')
CHAT = flags.DEFINE_bool("chat", False, "Put each prompt into the model's chat template, as a user's message.")
NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 8, "Held-out prompts to take when none are given.", lower_bound=1)
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 64, "Length of the held-out prompts.", lower_bound=1)
STRATEGIES = flags.DEFINE_list("strategies", ",".join(NAMES), f"Which of {', '.join(NAMES)} to run.")
EXIT_LAYER = flags.DEFINE_integer("exit_layer", None, "E: layers that draft (default: a quarter of the layers).")
NUM_SPECULATIONS = flags.DEFINE_integer("num_speculations", 4, "d: tokens drafted a round.")
TENSOR = flags.DEFINE_integer("tensor", 1, "Devices to split the model over (tensor parallelism).")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Prompts decoded together.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens to generate for each prompt.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy; above, tokens are drawn.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Sampling: only the k likeliest tokens (0: all).")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sampling: only the fewest tokens that together have this probability.")
SEED = flags.DEFINE_integer("seed", 0, "Sampling: other seeds draw other texts.", lower_bound=0)
STOP = flags.DEFINE_multi_string(
    "stop", [], "A text that ends a continuation, just before it; may be given repeatedly."
)
REPEATS = flags.DEFINE_integer("repeats", 3, "Measurements of each prompt and strategy.")
COMPARE = flags.DEFINE_enum("compare", None, ["transformers"], "Also decode with PyTorch transformers: same weights.")
REPORT = flags.DEFINE_string("report", None, "Write the results to this JSON file.")


def main() -> None:
    from lsjax.decoding.benchmark import benchmark
    from lsjax.evaluation.tables import decoding_table, print_table
    from lsjax.files import check_writable, write_atomically
    from lsjax.loading import load

    if REPORT.value:
        check_writable(Path(REPORT.value), "--report")
    model = load(MODEL.value, tensor=TENSOR.value)
    report = benchmark(
        model,
        _prompts(model),
        _strategies(model.config.num_layers, STRATEGIES.value),
        max_new_tokens=MAX_NEW_TOKENS.value,
        batch_size=BATCH_SIZE.value,
        repeats=REPEATS.value,
        sampling=_sampling(),
        seed=SEED.value,
        rivals=_rivals(model),
        stop=STOP.value,
        note=print,
    )
    print_table(decoding_table(report))
    if PROMPT.value:
        _print_texts(model)
    if REPORT.value:
        write_atomically(Path(REPORT.value), json.dumps(report, indent=2))
        print(f"report: {REPORT.value}")


def _prompts(model) -> list:
    from lsjax.prompts import held_out_prompts, read_prompts

    if PROMPT.value is not None and PROMPTS.value is not None:
        raise UserError("give --prompt or --prompts, not both")
    if PROMPT.value is not None or PROMPTS.value is not None:
        texts = [PROMPT.value] if PROMPT.value is not None else read_prompts(Path(PROMPTS.value))
        return [_in_template(model, text) for text in texts] if CHAT.value else texts
    if CHAT.value:
        raise UserError("--chat needs --prompt or --prompts")
    return held_out_prompts(Path(MODEL.value), NUM_PROMPTS.value, PROMPT_TOKENS.value)


def _in_template(model, text: str) -> list[int]:
    return model.tokenizer.encode_chat([{"role": "user", "content": text}])


def _strategies(num_layers: int, names: Sequence[str]) -> list:
    from lsjax.decoding.strategies import Autoregressive, EarlyExit, SelfSpeculative

    exit_layer = EXIT_LAYER.value if EXIT_LAYER.value is not None else max(1, num_layers // 4)
    makers = {
        "autoregressive": lambda: Autoregressive(),
        "early_exit": lambda: EarlyExit(exit_layer),
        "self_speculative": lambda: SelfSpeculative(exit_layer, NUM_SPECULATIONS.value),
    }
    unknown = [name for name in names if name not in makers]
    if unknown or not names:
        raise UserError(f"--strategies: {unknown[0] if unknown else 'empty'!r} is not one of {', '.join(NAMES)}")
    return [makers[name]() for name in names]


def _rivals(model):
    """What to measure beside our own strategies."""
    if not COMPARE.value:
        return lambda _: []
    if TEMPERATURE.value:
        raise UserError("--compare is for greedy decoding: leave --temperature at 0")
    if STOP.value:
        raise UserError("--compare knows no --stop: give one or the other")
    from lsjax.decoding.rivals import TransformersModel, TransformersTrial, ways

    (speculative,) = _strategies(model.config.num_layers, ["self_speculative"])
    known = ways(speculative.exit_layer, speculative.num_speculations, BATCH_SIZE.value)
    theirs = TransformersModel(model)
    return lambda batches: [TransformersTrial(theirs, way, batches) for way in known]


def _sampling():
    from lsjax.decoding.strategies import Sampling

    return Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)


def _print_texts(model) -> None:
    from lsjax.decoding.generate import generate

    gap = "\n" if CHAT.value else ""
    for strategy in _strategies(model.config.num_layers, STRATEGIES.value):
        how = (strategy, _sampling(), SEED.value, STOP.value)
        text = generate(model, _prompts(model), MAX_NEW_TOKENS.value, *how).text[0]
        print(f"\n--- {strategy.name}\n{PROMPT.value}{gap}{text}")


if __name__ == "__main__":
    commands.run(main)
