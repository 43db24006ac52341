"""The decoding table is readable at 80 columns and complete at 120, and notes say how not to read its speeds."""

import io

import pytest
from rich.console import Console

from lsjax.reports.tables import decoding_notes, decoding_table

ALWAYS = {"strategy", "exit", "drafts", "tokens/s", "speed-up", "same tokens", "repeated"}
WIDE = {"ms/token", "first token ms", "tokens/ round", "accepted"}


def run(strategy="self_speculative", **others):
    default = {
        "strategy": strategy, "exit_layer": 12, "num_speculations": 16, "draft_weights": None, "lookup": None,
        "batch_size": 1, "tokens_per_second": 12345.6, "ms_per_token": 1234.56, "time_to_first_token_ms": 123456.7,
        "acceptance_rate": 1.0, "tokens_per_round": 16.25, "speedup": 10.25, "predicted_speedup": None,
        "matches_autoregressive": True, "matching_share": 1.0, "repetition": 0.125,
    }  # fmt: skip
    return default | others


def report(*runs):
    return {"device": "NVIDIA H100 80GB HBM3 (gpu)", "weights": "bfloat16", "cache": "int8", "runs": list(runs)}


LONGEST = [
    run("autoregressive", exit_layer=None, num_speculations=None, acceptance_rate=None),
    run("self_speculative", draft_weights="int8"),
    run("self_speculative", lookup=16),
    run("transformers, dynamic cache", matches_autoregressive=False, matching_share=0.999),
]


def rendered(table, width) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().rstrip("\n").splitlines()


def headers(table) -> set[str]:
    return {str(column.header).replace("\n", " ") for column in table.columns}


@pytest.mark.parametrize("width", [80, 119, 120, 140])
@pytest.mark.parametrize("predicted", [None, 10.25])
def test_every_width_shows_whole_numbers_and_words(width, predicted):
    runs = [entry | {"predicted_speedup": predicted} for entry in LONGEST]
    table = decoding_table(report(*runs), width)
    assert headers(table) >= ALWAYS | ({"predicted"} if predicted else set())
    assert headers(table) >= WIDE or width < 120
    lines = rendered(table, width)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    whole = ["strategy", "repeated", "12346", "10.25", "self_speculative,", "transformers,", "16", "copied", "12%"]
    whole += ["yes", "99%"]
    if width >= 120:
        whole += ["1234.56", "123456.7", "16.25", "100%"]
    assert not [word for word in whole if word not in words]
    assert not [line for line in lines if "…" in line]


def test_in_a_file_nothing_is_folded():
    table = decoding_table(report(*LONGEST))
    assert headers(table) == ALWAYS | {"ms/token", "first token ms", "tokens/round", "accepted"}
    first = rendered(table, 1000)
    assert len(first) == 1 + 2 + len(LONGEST)  # title, header and its line, one line per run


def test_text_that_repeats_itself_is_named():
    assert decoding_notes(report(run(repetition=0.2), run(repetition=None))) == []
    (line,) = decoding_notes(report(run(repetition=0.1), run("early_exit", repetition=0.204)))
    assert line.startswith(
        "text repeats itself: up to 20% of the 4-grams of a new text occurred before in it (early_exit)"
    )
    assert line.endswith("; do not take this speed for ordinary text")


def test_a_setting_far_slower_than_autoregressive_gets_a_hint():
    fast, slow = run(speedup=0.8), run(speedup=0.41, acceptance_rate=0.21)
    assert decoding_notes(report(run("early_exit", speedup=0.1), fast, run(speedup=None))) == []
    (line,) = decoding_notes(report(fast, slow, run(speedup=0.7)))
    assert line.startswith("self_speculative with exit layer 12 and 16 drafts runs at 0.41 times the speed of autoreg")
    assert "only 21% of its drafts are accepted, so try fewer drafts or a later exit layer" in line
    (line,) = decoding_notes(report(run(speedup=0.5, acceptance_rate=0.9)))
    assert "drafting costs more than it saves, so try an earlier exit layer or fewer drafts" in line
