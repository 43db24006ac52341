"""The picture of an ablation."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt

from lsjax.ablation.recipes import BASELINE
from lsjax.ablation.report import Outcome
from lsjax.evaluation.figures import save_figure


def draw_ablation(path: Path, outcomes: Sequence[Outcome], num_layers: int) -> None:
    """Writes a PNG: loss by exit, the middle layer during training, acceptance by exit, and what each recipe's last
    layer costs against what it gives."""
    figure, ((exits, course), (drafts, trade)) = plt.subplots(2, 2, figsize=(14, 10), layout="constrained")
    middle = max(1, num_layers // 2)
    base = next(o for o in outcomes if o.recipe.name == BASELINE)
    shown = [o for o in outcomes if o.recipe.steps == 1]
    colors = plt.get_cmap("tab20").colors
    for index, o in enumerate(shown):
        style = {"color": colors[index % len(colors)], "label": o.recipe.name}
        exits.plot(o.profiles[0].exit_layers, o.mean_loss(), "o-", **style)
        course.plot(*zip(*o.history(middle), strict=True), **style)
        few = min(d for _, d in o.settings())
        layers = sorted({e for e, _ in o.settings()})
        drafts.plot(layers, [o.decoding(e, few)["acceptance_rate"] for e in layers], "o-", **style)
        change = 100 * (o.loss(num_layers) / base.loss(num_layers) - 1)
        trade.plot(change, o.fastest()["tokens_per_round"], "o", **style)
        trade.annotate(o.recipe.name, (change, o.fastest()["tokens_per_round"]), fontsize=8)
    exits.set(title="Held-out loss by exit", xlabel="exit layer", ylabel="nats a token", ylim=(None, 8))
    course.set(title=f"Held-out loss of exit layer {middle} during training", xlabel="step", ylim=(None, 9))
    drafts.set(title=f"Drafted tokens accepted, {few} a round", xlabel="exit layer", ylim=(0, 1))
    trade.set(
        title="Price and gain", xlabel="last layer's loss against no LayerSkip (%)", ylabel="tokens a round, fastest"
    )
    exits.legend(fontsize=8)
    save_figure(figure, path)
