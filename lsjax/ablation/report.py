"""What the runs of an ablation say: one table, one figure, and the questions it was run for."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lsjax.ablation.recipes import BASELINE, Recipe
from lsjax.ablation.run import is_done
from lsjax.evaluation.exits import ExitProfile
from lsjax.files import read_json


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All seeds of a recipe. `step_time` is in seconds, the same for every seed."""

    recipe: Recipe
    seeds: tuple[int, ...]
    results: tuple[dict[str, Any], ...]
    step_time: float

    def of_seeds(self, seeds: Sequence[int]) -> "Outcome":
        """Its runs from these seeds, so that seeds are compared with themselves; all of them where it has none."""
        shared = [index for index, seed in enumerate(self.seeds) if seed in seeds] or range(len(self.seeds))
        pick = lambda values: tuple(values[index] for index in shared)  # noqa: E731
        return dataclasses.replace(self, seeds=pick(self.seeds), results=pick(self.results))

    @property
    def profiles(self) -> list[ExitProfile]:
        return [ExitProfile(*(np.array(r["profile"][name]) for name in ExitProfile._fields)) for r in self.results]

    def loss(self, exit_layer: int) -> float:
        return statistics.mean(profile.at(exit_layer)[0] for profile in self.profiles)

    def spread(self, exit_layer: int) -> float:
        """Standard deviation of the loss over seeds."""
        losses = [profile.at(exit_layer)[0] for profile in self.profiles]
        return statistics.stdev(losses) if len(losses) > 1 else float("nan")

    def agreement(self, exit_layer: int) -> float:
        return statistics.mean(profile.at(exit_layer)[2] for profile in self.profiles)

    def mean_loss(self) -> np.ndarray:
        """[n], by exit."""
        return np.mean([profile.loss for profile in self.profiles], axis=0)

    def history(self, exit_layer: int) -> list[tuple[int, float]]:
        """(step, held-out loss) of an exit during training, of the first seed."""
        return [(e["step"], e["loss"][str(exit_layer)]) for e in self.results[0]["evaluations"]]

    def decoding(self, exit_layer: int, num_speculations: int) -> dict[str, float]:
        """acceptance_rate, tokens_per_round and speedup of a setting: means over the seeds."""
        wanted = exit_layer, num_speculations
        runs = [
            run for r in self.results for run in r["decoding"] if (run["exit_layer"], run["num_speculations"]) == wanted
        ]
        names = "acceptance_rate", "tokens_per_round", "speedup"
        return {name: statistics.mean(run[name] or 0.0 for run in runs) for name in names}

    def settings(self) -> list[tuple[int, int]]:
        return [(run["exit_layer"], run["num_speculations"]) for run in self.results[0]["decoding"]]

    def fastest(self) -> dict[str, Any]:
        """The setting with the highest speed-up."""
        best = max(self.settings(), key=lambda pair: self.decoding(*pair)["speedup"])
        return {"exit_layer": best[0], "num_speculations": best[1]} | self.decoding(*best)


def outcomes(workdir: Path, recipes: Sequence[Recipe]) -> list[Outcome]:
    """Of every recipe that has at least one finished seed, as many as it has."""
    times = read_json(workdir / "step_times.json")
    found = []
    for recipe in recipes:
        folders = {int(folder.name.removeprefix("seed")): folder for folder in (workdir / recipe.name).glob("seed*")}
        seeds = tuple(sorted(seed for seed, folder in folders.items() if is_done(folder)))
        if seeds and recipe.name in times:
            results = tuple(read_json(folders[seed] / "result.json") for seed in seeds)
            found.append(Outcome(recipe, seeds, results, times[recipe.name]))
    return found


def baseline_at_equal_time(all_outcomes: Sequence[Outcome], outcome: Outcome) -> float:
    """The last layer's loss that no LayerSkip reaches in the time that `outcome` took, between (or, in steps, beyond)
    what its own shorter and longer runs reached; nan without these."""
    plain = [o.of_seeds(outcome.seeds) for o in all_outcomes if not o.recipe.layerskip]
    if len(plain) < 2:
        return float("nan")
    plain.sort(key=lambda o: o.recipe.steps)
    by_name = {o.recipe.name: o for o in plain}
    steps = outcome.recipe.steps * outcome.step_time / by_name[BASELINE].step_time
    known = np.log([o.recipe.steps for o in plain])
    losses = [_last(o) for o in plain]
    # Straight lines in the logarithm of the steps; the outermost ones go on.
    index = int(np.clip(np.searchsorted(known, np.log(steps)), 1, len(known) - 1))
    slope = (losses[index] - losses[index - 1]) / (known[index] - known[index - 1])
    return float(losses[index - 1] + slope * (np.log(steps) - known[index - 1]))


def _last(outcome: Outcome) -> float:
    return outcome.loss(int(outcome.profiles[0].exit_layers[-1]))


def table(all_outcomes: Sequence[Outcome], num_layers: int) -> Table:
    """A row a recipe. Losses are held out, in nats a token; `at equal time` compares the last layer's with no
    LayerSkip's in the same time."""
    quarter, half = max(1, num_layers // 4), max(1, num_layers // 2)
    result = Table(title="Recipes, held-out text", title_justify="left")
    result.add_column("recipe")
    for name in (
        "seeds", "last loss", "at equal steps", "step time", "at equal time", f"loss {quarter}", f"loss {half}",
        f"agrees {quarter}", f"agrees {half}", f"accepted {quarter}", f"accepted {half}", "tokens/round",
        "speed-up (E, d)",
    ):  # fmt: skip
        result.add_column(name, justify="right")
    base = next(o for o in all_outcomes if o.recipe.name == BASELINE)
    drafts = min(d for _, d in base.settings())
    for o in all_outcomes:
        last, spread = _last(o), o.spread(num_layers)
        best = o.fastest()
        result.add_row(
            o.recipe.name,
            str(len(o.seeds)),
            f"{last:.3f}" + (f" ±{spread:.3f}" if len(o.seeds) > 1 else ""),
            _change(last, _last(base.of_seeds(o.seeds))),
            f"{o.step_time / base.step_time:.2f}",
            _change(last, baseline_at_equal_time(all_outcomes, o)),
            f"{o.loss(quarter):.3f}",
            f"{o.loss(half):.3f}",
            f"{o.agreement(quarter):.0%}",
            f"{o.agreement(half):.0%}",
            *(f"{o.decoding(e, drafts)['acceptance_rate']:.0%}" for e in (quarter, half)),
            f"{best['tokens_per_round']:.2f}",
            f"{best['speedup']:.2f} ({best['exit_layer']}, {best['num_speculations']})",
        )
    return result


def _change(loss: float, reference: float) -> str:
    return "-" if np.isnan(reference) else f"{loss / reference - 1:+.1%}"


def findings(all_outcomes: Sequence[Outcome], num_layers: int) -> list[str]:
    """The paper's Figures 11 and 12, reproduced or contradicted, where the runs for them are there."""
    found = {o.recipe.name: o for o in all_outcomes}
    middle = max(1, num_layers // 2)
    lines = []
    for name in (BASELINE, "dropout", "exit-loss", "paper"):
        if name in found:
            history = found[name].history(middle)
            best = min(loss for _, loss in history)
            verdict = "gets worse" if history[-1][1] > 1.02 * best else "does not get worse"
            lines.append(
                f"{name}: the middle layer's loss {verdict} while training (best {best:.2f}, last {history[-1][1]:.2f})"
            )
    if {"dropout", "constant-dropout"} <= {*found}:
        ours, constant = found["dropout"], found["constant-dropout"]
        difference, noise = _last(ours) - _last(constant), max(ours.spread(num_layers), constant.spread(num_layers))
        lines.append(
            f"dropout exponential in depth against a constant of equal mean: {difference:+.3f} nats at the last layer"
            + ("" if np.isnan(noise) else f" (seeds differ by {noise:.3f})")
        )
    return lines
