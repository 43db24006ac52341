"""The README's Python runs as it stands, on a model made here."""

import re
from pathlib import Path

from lsjax.training.loop import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(tiny_run, tmp_path, monkeypatch, capsys):
    train(tiny_run, tmp_path / "runs" / "demo", verbose=False)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["logits"].shape == (1, len(names["tokens"][0]), 320)
    assert names["states"].shape == (4, 1, len(names["tokens"][0]), 32)
    assert capsys.readouterr().out


def test_every_file_and_command_it_names_exists():
    for path in set(re.findall(r"\b(?:launch|configs|lsjax)/\w+\.py\b", README)):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make ([a-z]+)", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert f"\n{target}:" in makefile, target
