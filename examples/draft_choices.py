"""Simulates two ways to draft that lsjax does not have, to see what they would give a model on held-out text.

- A choice per round: each round takes one of up to three settings (exit layer, drafts), by the acceptance of each exit
  so far. Only the exit that drafted is observed. Settings and decay are chosen on half of the texts, and judged on the
  others.
- Siblings at the root: beside the first draft, the exit's next likely tokens are verified too. When the first draft is
  wrong and the text's token is one of them, the round emits two tokens in place of one.

  python examples/draft_choices.py --model=models/python-20m \\
    --data=runs/continual_python_20m/data --temperature=0.8

The model decodes held-out prompts once, and one pass over these texts tells which drafts of every exit would be kept
(`lsjax.tuning.acceptance`). Costs are weights that a pass reads, layers and head, in passes of the whole model. A row
more in verification costs `row` of such a pass: about nothing on an accelerator, 0.25 to 0.5 on a CPU.
"""

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import lsjax
from lsjax.benchmarks.prompts import prompts_of_data
from lsjax.decoding.batch import GenerationConfig, PromptBatch
from lsjax.tuning.acceptance import draft_acceptance

LONGEST_DRAFT = 12
REPLICATES = 4  # fates that are drawn for each sampled text
ROW_COSTS = (0.0, 0.25)


class Texts(NamedTuple):
    """Decoded texts of n new tokens. kept: the chance that each exit's draft is kept [L,N,n]; rank: of each token."""

    kept: np.ndarray
    rank: np.ndarray


class Costs(NamedTuple):
    """The costs of a round, in passes of the whole model. layer, head: shares of a pass. row: per row verified more."""

    num_layers: int
    layer: float
    head: float
    row: float

    def round(self, exit_layer: int, drafts: int, siblings: int = 0) -> float:
        early, late = exit_layer * self.layer, (self.num_layers - exit_layer) * self.layer
        verification = (late + self.head) * (1 + self.row * drafts)
        return drafts * (early + self.head) + early + verification + siblings * self.row if drafts else 1.0


def decode(model: lsjax.Model, prompts: list[list[int]], new_tokens: int, sampling: lsjax.Sampling) -> Texts:
    """Decodes the prompts, and reads the texts once."""
    tokens = lsjax.generate(model, prompts, new_tokens, sampling=sampling, batch_size=8).tokens
    whole = [index for index, new in enumerate(tokens) if len(new) == new_tokens]
    batch = PromptBatch.make(model, [prompts[i] for i in whole], GenerationConfig(new_tokens, sampling))
    texts = np.zeros((len(whole), int(batch.lengths.max()) + new_tokens), np.int32)
    for row, index in enumerate(whole):
        texts[row, : batch.lengths[row] + new_tokens] = [*prompts[index], *tokens[index]]
    every = np.ones((1, model.config.vocab_size), bool)
    dtype = model.decoder_weights()["embed"].dtype
    found = draft_acceptance(model.params, texts, batch.lengths, batch.sampler, model.config, new_tokens, dtype, every)
    return Texts(np.asarray(found.chance[0], float), np.asarray(found.rank[0]))


def run_lengths(kept: np.ndarray) -> np.ndarray:
    """Returns how many drafts from each position on are kept [L,N,n]. kept: whether each one is."""
    runs = np.zeros((*kept.shape[:-1], kept.shape[-1] + 1), int)
    for i in reversed(range(kept.shape[-1])):
        runs[..., i] = np.where(kept[..., i], runs[..., i + 1] + 1, 0)
    return runs[..., :-1]


def tokens_per_round(runs: np.ndarray, rank: np.ndarray, exit_layer: int, drafts: int, siblings: int = 0) -> float:
    """Returns the tokens per round of a fixed setting over all texts; the first token is prefill's."""
    runs, rank, n = runs[exit_layer - 1], rank[exit_layer - 1], runs.shape[-1]
    rows, place, rounds = np.arange(len(runs)), np.ones(len(runs), int), 0
    while (active := place < n).any():
        here = rows, np.minimum(place, n - 1)
        found = np.minimum(runs[here], drafts)
        if drafts:
            found = np.where((found == 0) & (rank[here] >= 1) & (rank[here] <= siblings), 1, found)
        place, rounds = place + active * (found + 1), rounds + active.sum()
    return len(runs) * (n - 1) / rounds


def expected_tokens(acceptance: np.ndarray, drafts: int) -> np.ndarray:
    """Returns (1 - a^(d+1)) / (1 - a)."""
    return sum(acceptance**i for i in range(drafts + 1))  # pyright: ignore[reportReturnType]


def speed_by_choice(
    runs: np.ndarray, costs: Costs, settings: list, prior: np.ndarray, decay: float, weight: float, knows: bool = False
) -> float:
    """Returns the tokens per pass when each round chooses a setting.

    prior: the mean acceptance of each exit [L]; it counts as `weight` drafts. knows: each round knows what it would
    give, which no rule does.
    """
    n, rows = runs.shape[-1], np.arange(runs.shape[1])
    price = np.array([costs.round(*setting) for setting in settings])
    exits, lengths = (np.array(values) for values in zip(*settings, strict=True))
    kept, tried = np.zeros((2, *runs.shape[:2]))
    place, total = np.ones(len(rows), int), 0.0
    while (active := place < n).any():
        found = np.minimum(runs[exits - 1][:, rows, np.minimum(place, n - 1)], lengths[:, None])
        chance = (kept + weight * prior[:, None]) / (tried + weight)
        guess = found + 1 if knows else np.array([expected_tokens(chance[e - 1], d) for e, d in settings])
        chosen = np.argmax(guess / price[:, None], axis=0)
        got, exit_index = found[chosen, rows], exits[chosen] - 1
        kept, tried = decay * kept, decay * tried
        kept[exit_index, rows] += got
        tried[exit_index, rows] += np.minimum(got + 1, lengths[chosen])
        place, total = place + active * (got + 1), total + price[chosen] @ active
    return len(rows) * (n - 1) / total


def best_rule(runs: np.ndarray, costs: Costs, first: tuple[int, int], prior: np.ndarray) -> tuple[list, float, float]:
    """Returns (settings, decay, weight of the prior) with which the rule is the fastest.

    It adds to the setting `first` the best other one, then the best third one.
    """
    pool = [(1, 0), *itertools.product(range(1, 3 * costs.num_layers // 4 + 1), (1, 2, 3, 4, 6, 8))]
    settings, best = [first], (0.0, ([first], 0.9, 4.0))
    for _ in range(2):
        rules = [([*settings, other], decay, 4.0) for other in pool if other not in settings for decay in (0.8, 0.95)]
        found = max((speed_by_choice(runs, costs, rule[0], prior, *rule[1:]), rule) for rule in rules)
        if found[0] <= best[0]:
            break
        best, settings = found, found[1][0]
    return best[1]


def report(texts: Texts, costs: Costs, sampled: bool) -> None:
    """Prints what both ways would give, for one cost of a row."""
    replicates = REPLICATES if sampled else 1
    chances = np.repeat(texts.kept, replicates, axis=1)
    fates = np.random.default_rng(0).uniform(size=chances.shape[1:])  # one of a token, for all exits
    runs, nothing = run_lengths(fates < chances), np.zeros(chances.shape)
    grid = [(1, 0), *itertools.product(range(1, 3 * costs.num_layers // 4 + 1), range(1, LONGEST_DRAFT + 1))]

    def best(runs, rank, siblings):
        found = {pair: tokens_per_round(runs, rank, *pair, siblings) for pair in grid}
        return max((count / costs.round(*pair, siblings), pair, count) for pair, count in found.items())

    speed, pair, count = best(runs, nothing, 0)
    print(f"row {costs.row}: best setting {pair}, {count:.2f} tokens per round, speed {speed:.3f}")
    half = np.arange(chances.shape[1]) // replicates % 2 == 0
    here, there = runs[:, half], runs[:, ~half]
    _, first, _ = best(here, nothing, 0)
    prior = texts.kept[:, ::2].mean(axis=(1, 2))
    settings, decay, weight = best_rule(here, costs, first, prior)
    fixed = tokens_per_round(there, nothing, *first) / costs.round(*first)
    rule, oracle = (speed_by_choice(there, costs, settings, prior, decay, weight, knows) for knows in (False, True))
    print(f"  chosen on half of the texts, speed on the others: {first} {fixed:.3f}; rule {rule:.3f} with {settings},")
    print(f"  decay {decay}; the same settings if each round knew its outcome {oracle:.3f}")
    chain = run_lengths(texts.rank == 0)
    for siblings in (0, 1, 2, 4):
        speed, own, count = best(chain, texts.rank, siblings)
        print(
            f"  likeliest drafts, {siblings} siblings: best setting {own}, {count:.2f} tokens per round, "
            f"speed {speed:.3f}"
        )


def main() -> None:
    """Runs the simulation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="a folder of prepared data, for held-out prompts")
    parser.add_argument("--num_prompts", type=int, default=24)
    parser.add_argument("--prompt_tokens", type=int, default=96)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    flags = parser.parse_args()
    model = lsjax.load(flags.model)
    prompts = prompts_of_data(flags.data, flags.num_prompts, flags.prompt_tokens)
    texts = decode(model, prompts, flags.new_tokens, lsjax.Sampling(flags.temperature))
    config = model.config
    print(f"{flags.model} at temperature {flags.temperature}: {texts.kept.shape[1]} texts of {flags.new_tokens} tokens")
    for exit_layer in range(1, 3 * config.num_layers // 4 + 1):
        ranks, kept = texts.rank[exit_layer - 1], texts.kept[exit_layer - 1].mean()
        shares = ", ".join(f"{np.mean(ranks == rank):.3f}" for rank in range(5))
        print(f"exit {exit_layer}: kept {kept:.3f}; the text's token has rank 0 to 4 in {shares}")
    layer = sum(leaf.size for leaf in jax.tree.leaves(model.stack_params()["layers"])) / config.num_layers
    head = config.vocab_size * config.width
    whole = config.num_layers * layer + head
    for row in ROW_COSTS:
        report(texts, Costs(config.num_layers, layer / whole, head / whole, row), flags.temperature > 0)


if __name__ == "__main__":
    main()
