"""Cause and effect on a laptop: a plain model decodes, learns to exit early, and decodes the same text faster."""

import dataclasses
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lsjax.benchmarks.decoding import benchmark
from lsjax.benchmarks.prompts import prompts_of_data
from lsjax.config import Config
from lsjax.data.prepare import prepare
from lsjax.decoding.model import Model, load
from lsjax.decoding.strategies import GREEDY, Sampling, SelfSpeculative, Strategy
from lsjax.errors import UserError
from lsjax.evaluation.exits import ExitProfile
from lsjax.experiments.continual import measure_exits, profile_from, profile_tree
from lsjax.experiments.sweep import Grid, summary
from lsjax.files import disk_path, own_results, read_json, write_atomically
from lsjax.generation import generate
from lsjax.io.workdir import check_free, data_directory
from lsjax.reports.figures import draw_before_and_after
from lsjax.reports.tables import comparison_table, print_decoding_report, print_table, text_table
from lsjax.training.loop import train

SAMPLINGS = {"greedy": GREEDY, "T=0.8": Sampling(0.8)}

_EXPLANATION = """\
Each row predicts the next token after that many layers, with the one shared head. The early layers of a plain model
cannot: nothing taught them to. A low loss there, and high agreement with the last layer, mean that they can draft."""


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """The measurements of the demo, taken before and after training on held-out prompts.

    exit_layers: exit layers to draft with; none means config.layerskip.draft_exit.
    num_speculations: drafts per round.
    lookup: each exit layer is also measured copying up to this many drafts from the text before. 0 copies nothing.
    """

    exit_layers: tuple[int, ...] = ()
    num_speculations: tuple[int, ...] = (1, 2, 3)
    lookup: int = 8
    prompts: int = 6
    prompt_tokens: int = 96
    max_new_tokens: int = 64
    repeats: int = 3

    def check(self, config: Config) -> None:
        """Raises UserError for settings that cannot be measured, before minutes are spent on training."""
        if not config.initial_model:
            raise UserError(
                "the demo shows a model before and after LayerSkip: set config.initial_model, or train from random "
                "parameters with `lsjax train`"
            )
        if not (self.exit_layers or config.layerskip.draft_exit):
            raise UserError("the demo needs an exit layer to draft with: set config.layerskip.draft_exit")
        self.grid(config).check(config.model.num_layers)
        needed = min(self.prompt_tokens, config.training.sequence_length) + self.max_new_tokens
        if needed > config.model.context_length:
            raise UserError(
                f"the demo decodes {needed} tokens: raise config.model.context_length, {config.model.context_length}"
            )

    def grid(self, config: Config) -> Grid:
        """Returns the settings without copied drafts."""
        return Grid(self.exit_layers or (config.layerskip.draft_exit,), self.num_speculations)

    def strategies(self, config: Config) -> list[Strategy]:
        """Lists everything to measure beside autoregressive decoding."""
        grid = self.grid(config)
        most = max(grid.num_speculations)
        copying = [SelfSpeculative(exit_layer, most, lookup=self.lookup) for exit_layer in grid.exit_layers]
        return [*grid.strategies(), *(copying if self.lookup else [])]


class Snapshot(NamedTuple):
    """The exits, speeds and texts of one model on held-out text.

    decoding: reports of `benchmark`, by name of SAMPLINGS. texts: continuations of the first prompt, likewise.
    """

    profile: ExitProfile
    decoding: dict[str, dict[str, Any]]
    texts: dict[str, str]


def run_demo(config: Config, workdir: str | Path, settings: DemoSettings) -> dict[str, Any] | signal.Signals:
    """Measures the initial model, trains it (or resumes), and measures it again, on the same held-out text.

    Prints both, and writes before.json, report.json and demo.png to `workdir`. Returns the report, or the
    signal that interrupted training.
    """
    workdir = disk_path(workdir, "workdir")
    settings.check(config)
    check_free(workdir, config)
    model = load(config.initial_model)
    directory = data_directory(workdir, config)
    prepare(config, directory, given=model.tokenizer)
    prompts = prompts_of_data(directory, settings.prompts, settings.prompt_tokens)
    before = _measure_once(workdir / "before.json", model, config, directory, prompts, settings)
    print(f"\n{config.initial_model}, as it comes:\n")
    print_table(comparison_table({"before": before.profile}))
    print(_EXPLANATION, end="\n\n")
    _print_decoding(before)
    del model

    result = train(config, workdir)
    if result.profile is None:  # there is nothing to show yet
        return result.interrupted or signal.SIGTERM
    model = load(workdir)
    after = _decode(model, result.profile, config, prompts, settings)
    report = {"before": _tree(before), "after": _tree(after)}
    write_atomically(workdir / "report.json", json.dumps(report, indent=2))
    title = f"{config.initial_model}, held-out text"
    draw_before_and_after(workdir / "demo.png", report["before"], report["after"], title)
    _print_comparison(before, after, model.tokenizer.decode(prompts[0]))
    print(f"picture: {workdir / 'demo.png'}   report: {workdir / 'report.json'}")
    return report


def _measure_once(
    path: Path, model: Model, config: Config, directory: Path, prompts: Sequence[list[int]], settings: DemoSettings
) -> Snapshot:
    """Measures the initial model. A run that goes on reads the file, to save minutes."""
    asked = {
        "initial_model": config.initial_model,
        "exit_layers": list(settings.grid(config).exit_layers),
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "batches": config.evaluation.max_batches,
    }
    tree = read_json(path) if path.exists() else {}
    if tree.get("asked") == asked:
        with own_results(path):
            return Snapshot(profile_from(tree["profile"]), dict(tree["decoding"]), dict(tree["texts"]))
    profile = measure_exits(model, config, directory)
    before = _decode(model, profile, config, prompts, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"asked": asked} | _tree(before)))
    return before


def _decode(
    model: Model, profile: ExitProfile, config: Config, prompts: Sequence[list[int]], settings: DemoSettings
) -> Snapshot:
    """Returns the snapshot of a model whose exits were measured."""
    reports, texts = {}, {}
    for name, sampling in SAMPLINGS.items():
        print(f"decoding, {name}:", flush=True)
        options = {"max_new_tokens": settings.max_new_tokens, "sampling": sampling}
        reports[name] = benchmark(
            model, prompts, settings.strategies(config), repeats=settings.repeats, note=print, **options
        )
        texts[name] = generate(model, prompts[:1], **options).text[0]
    return Snapshot(profile, reports, texts)


def _tree(snapshot: Snapshot) -> dict[str, Any]:
    return {"profile": profile_tree(snapshot.profile), "decoding": snapshot.decoding, "texts": snapshot.texts}


def _print_decoding(snapshot: Snapshot) -> None:
    for name, report in snapshot.decoding.items():
        print(f"{name}:")
        print_decoding_report(report)
        print()


def _print_comparison(before: Snapshot, after: Snapshot, prompt: str) -> None:
    print("\nafter LayerSkip:\n")
    print_table(comparison_table({"before": before.profile, "after": after.profile}))
    _print_decoding(after)
    for name in SAMPLINGS:
        print_table(text_table(name, prompt, {"before": before.texts[name], "after": after.texts[name]}))
    change = after.profile.loss[-1] / before.profile.loss[-1] - 1
    print(f"last layer's held-out loss: {before.profile.loss[-1]:.3f} -> {after.profile.loss[-1]:.3f} ({change:+.1%})")
    for name in SAMPLINGS:
        print(f"{name}, before: {summary(before.decoding[name])}")
        print(f"{name}, after:  {summary(after.decoding[name])}")
