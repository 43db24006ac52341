"""Runs an ablation from the first training run to its table and figure."""

import signal
from collections.abc import Sequence
from pathlib import Path

from lsjax.checks import check_seed
from lsjax.config import Config
from lsjax.errors import UserError
from lsjax.experiments.ablation.figure import draw_ablation
from lsjax.experiments.ablation.recipes import choose
from lsjax.experiments.ablation.report import findings, outcomes, table
from lsjax.experiments.ablation.run import run_all
from lsjax.files import disk_path
from lsjax.reports.tables import print_table


def ablate(
    config: Config, workdir: str | Path, names: Sequence[str] = (), seeds: Sequence[int] = (0,)
) -> signal.Signals | None:
    """Trains recipes from each seed, prints the table of all finished recipes, and writes ablation.png to `workdir`.

    names: the recipes beside the baseline; empty for all. When interrupted it stops after saving, and the same call
    resumes; it returns the signal. Raises UserError for an unknown recipe or a seed out of range.
    """
    if not seeds:
        raise UserError("seeds must be numbers from 0 on, got none")
    for seed in seeds:
        check_seed(seed, "each of seeds")
    workdir, layers = disk_path(workdir, "workdir"), config.model.num_layers
    if interrupted := run_all(config, workdir, choose(names, layers), seeds):
        return interrupted
    found = outcomes(workdir, layers)
    print()
    print_table(table(found, layers))
    for line in findings(found, layers):
        print(line)
    draw_ablation(workdir / "ablation.png", found, layers)
    print(f"picture: {workdir / 'ablation.png'}")
    return None
