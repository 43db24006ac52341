"""A run on completions with two held-out sets of its own: each is evaluated by itself."""

import dataclasses
import json

import pytest

from lsjax.benchmarks.prompts import held_out_prompts
from lsjax.training.loop import train

pytestmark = pytest.mark.usefixtures("compilation_cache")


def test_each_validation_set_is_evaluated_by_itself(tiny_run, tmp_path):
    for name in ("corpus", "short", "long"):
        words = {"corpus": 5, "short": 2, "long": 30}[name]
        rows = [{"prompt": f"{name} {i}: ", "completion": "word " * words} for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = dataclasses.replace(
        tiny_run,
        data=dataclasses.replace(
            tiny_run.data,
            corpus=str(tmp_path / "corpus.jsonl"),
            format="completion",
            validation=f"short={tmp_path}/short.jsonl,long={tmp_path}/long.jsonl",
        ),
        training=dataclasses.replace(tiny_run.training, total_steps=2, warmup_steps=1),
    )
    result = train(run, tmp_path / "run", verbose=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [(row["step"], row["set"]) for row in rows] == [(2, "short"), (2, "long")]
    assert rows[0]["loss"] != rows[1]["loss"]
    assert result.profile.loss[-1] == pytest.approx(rows[0]["loss"]["4"])
    prompts = held_out_prompts(tmp_path / "run", 2, 8)
    assert all(len(prompt) == 8 for prompt in prompts)
