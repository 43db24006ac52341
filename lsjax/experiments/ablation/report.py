"""The results of an ablation: its table, and its answers to the questions of the paper's Figures 11 and 12."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lsjax.evaluation.exits import ExitProfile
from lsjax.experiments.ablation.recipes import BASELINE, Recipe, recipes
from lsjax.experiments.ablation.run import is_done, read_step_times
from lsjax.files import own_results, read_json

_DECODING = ("acceptance_rate", "tokens_per_round", "speedup")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of one recipe.

    seeds, results: the finished seeds, and the content of result.json of each. step_time: seconds per training step.
    """

    recipe: Recipe
    seeds: tuple[int, ...]
    results: tuple[dict[str, Any], ...]
    step_time: float

    def of_seeds(self, seeds: Sequence[int]) -> "Outcome":
        """Returns the results from these seeds only, so that runs are compared with runs from the same seeds.

        Returns all results if there are none from these seeds.
        """
        shared = [index for index, seed in enumerate(self.seeds) if seed in seeds] or range(len(self.seeds))
        return dataclasses.replace(
            self,
            seeds=tuple(self.seeds[index] for index in shared),
            results=tuple(self.results[index] for index in shared),
        )

    @property
    def profiles(self) -> list[ExitProfile]:
        """The exit profile of each seed."""
        return [ExitProfile(*(np.array(r["profile"][name]) for name in ExitProfile._fields)) for r in self.results]

    def loss(self, exit_layer: int) -> float:
        """Returns the held-out loss of an exit, as the mean over the seeds."""
        return statistics.mean(profile.at(exit_layer)[0] for profile in self.profiles)

    def spread(self, exit_layer: int) -> float:
        """Returns the standard deviation of the loss over the seeds; NaN for one seed."""
        losses = [profile.at(exit_layer)[0] for profile in self.profiles]
        return statistics.stdev(losses) if len(losses) > 1 else float("nan")

    def agreement(self, exit_layer: int) -> float:
        """Returns how often an exit agrees with the last layer, as the mean over the seeds."""
        return statistics.mean(profile.at(exit_layer)[2] for profile in self.profiles)

    def mean_loss(self) -> np.ndarray:
        """Returns the loss of each exit [n], as the mean over the seeds."""
        return np.mean([profile.loss for profile in self.profiles], axis=0)

    def history(self, exit_layer: int) -> list[tuple[int, float]]:
        """Returns (step, held-out loss) of an exit during the training of the first seed."""
        return [(e["step"], e["loss"][str(exit_layer)]) for e in self.results[0]["evaluations"]]

    def decoding(self, exit_layer: int, num_speculations: int) -> dict[str, float]:
        """Returns acceptance_rate, tokens_per_round and speedup of a setting, as means over the seeds."""
        wanted = exit_layer, num_speculations
        runs = [
            run for r in self.results for run in r["decoding"] if (run["exit_layer"], run["num_speculations"]) == wanted
        ]
        return {name: statistics.mean(run[name] or 0.0 for run in runs) for name in _DECODING}

    def settings(self) -> list[tuple[int, int]]:
        """Lists the measured settings as (exit_layer, num_speculations)."""
        return [(run["exit_layer"], run["num_speculations"]) for run in self.results[0]["decoding"]]

    def fastest(self) -> dict[str, Any]:
        """Returns the setting with the highest speed-up, and its measurements."""
        best = max(self.settings(), key=lambda pair: self.decoding(*pair)["speedup"])
        return {"exit_layer": best[0], "num_speculations": best[1]} | self.decoding(*best)


def outcomes(workdir: Path, num_layers: int) -> list[Outcome]:
    """Reads the finished seeds of every recipe that has any. Raises UserError that names a damaged file."""
    times = read_step_times(workdir)
    found = []
    for recipe in recipes(num_layers).values():
        folders = {int(folder.name.removeprefix("seed")): folder for folder in (workdir / recipe.name).glob("seed*")}
        seeds = tuple(sorted(seed for seed, folder in folders.items() if is_done(folder)))
        if seeds and recipe.name in times:
            results = tuple(_read_result(folders[seed] / "result.json", num_layers) for seed in seeds)
            found.append(Outcome(recipe, seeds, results, times[recipe.name]))
    return found


def _read_result(path: Path, num_layers: int) -> dict[str, Any]:
    tree = read_json(path)
    with own_results(path):
        exits = [str(exit_layer) for exit_layer in range(1, num_layers + 1)]
        for name in ExitProfile._fields:
            if len([float(value) for value in tree["profile"][name]]) != num_layers:
                raise ValueError(f"{name} has not one value per exit")
        for evaluation in tree["evaluations"]:
            _ = int(evaluation["step"]), [float(evaluation["loss"][exit_layer]) for exit_layer in exits]
        for run in tree["decoding"]:
            _ = int(run["exit_layer"]), int(run["num_speculations"])
            _ = [float(run[name] or 0) for name in _DECODING]
    return tree


def baseline_at_equal_time(all_outcomes: Sequence[Outcome], outcome: Outcome) -> float:
    """Returns the last layer's loss that no LayerSkip reaches in the training time that `outcome` took.

    It is interpolated between the baseline's shorter and longer runs, or extrapolated beyond them. Returns NaN when
    there is only one such run.
    """
    plain = [o.of_seeds(outcome.seeds) for o in all_outcomes if not o.recipe.layerskip]
    if len(plain) < 2:
        return float("nan")
    plain.sort(key=lambda o: o.recipe.steps)
    by_name = {o.recipe.name: o for o in plain}
    steps = outcome.recipe.steps * outcome.step_time / by_name[BASELINE].step_time
    known = np.log([o.recipe.steps for o in plain])
    losses = [_last(o) for o in plain]
    # Interpolate linearly in the logarithm of the steps; beyond the outermost runs, extrapolate the last segment.
    index = int(np.clip(np.searchsorted(known, np.log(steps)), 1, len(known) - 1))
    slope = (losses[index] - losses[index - 1]) / (known[index] - known[index - 1])
    return float(losses[index - 1] + slope * (np.log(steps) - known[index - 1]))


def _last(outcome: Outcome) -> float:
    return outcome.loss(int(outcome.profiles[0].exit_layers[-1]))


def table(all_outcomes: Sequence[Outcome], num_layers: int) -> Table:
    """Returns the table of an ablation, one row per recipe.

    Losses are on held-out text, in nats per token. "at equal time" compares the last layer's loss with what no
    LayerSkip reaches in the same training time.
    """
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
    """Returns a line for each finding of the paper's Figures 11 and 12 that these runs reproduce or contradict."""
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
