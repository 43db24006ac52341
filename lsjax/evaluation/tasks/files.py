"""Tasks that read a user's files, in the format in which each data set is published."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from lsjax.data.jsonl import read_jsonl, text_of
from lsjax.errors import UserError
from lsjax.evaluation.scores import METRICS, exact_match, final_number, rouge
from lsjax.evaluation.tasks.rows import read_rows, read_split, split_files
from lsjax.evaluation.tasks.task import Example
from lsjax.files import path_of


@dataclasses.dataclass(frozen=True)
class Summaries:
    """Summaries of articles, scored by ROUGE: CNN/DailyMail and XSum.

    path: a file, or a folder with the splits test and (for shots) train. article, summary: the names of their columns.
    num_shots: articles with their summaries that come before each prompt.
    """

    path: Path
    article: str
    summary: str
    num_shots: int
    max_new_tokens: int
    metrics: tuple[str, ...] = ("rouge2", "rouge1", "rougeL")  # the paper's Table 3 gives ROUGE-2
    stop: tuple[str, ...] = ("\n\n", "Article:")

    def examples(self) -> list[Example]:
        """Returns the articles of the split test, each with its summary as reference."""

        def ask(article: str) -> str:
            return f"Article: {article.strip()}\nSummary:"

        return few_shot_examples(self.path, self.num_shots, self.article, self.summary, ask)

    def score(self, example: Example, text: str) -> dict[str, float]:
        """Returns ROUGE-1, ROUGE-2 and ROUGE-L."""
        return rouge(text, example.reference)


def cnn_dm(path: Path, num_shots: int | None) -> Summaries:
    """Returns CNN/DailyMail (columns article and highlights), 1-shot by default as in the paper."""
    return Summaries(path, "article", "highlights", 1 if num_shots is None else num_shots, max_new_tokens=128)


def xsum(path: Path, num_shots: int | None) -> Summaries:
    """Returns XSum (columns document and summary), 0-shot by default as in the paper."""
    return Summaries(path, "document", "summary", num_shots or 0, max_new_tokens=64)


@dataclasses.dataclass(frozen=True)
class TopV2:
    """TOPv2 (Chen et al. 2020): the parse of an utterance, in brackets, right only as a whole.

    path: a file .tsv (domain, utterance, semantic_parse), or a folder of them, such as weather_test.tsv.
    """

    path: Path
    num_shots: int = 0
    metrics: tuple[str, ...] = ("exact_match",)
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 80  # as in the paper's Table 6

    def examples(self) -> list[Example]:
        """Returns the utterances of the split test, each with its parse as reference."""

        def ask(utterance: str) -> str:
            return f"Utterance: {utterance.strip()}\nParse:"

        return few_shot_examples(self.path, self.num_shots, "utterance", "semantic_parse", ask)

    def score(self, example: Example, text: str) -> dict[str, float]:
        """Returns whether the whole parse is right, after white space is made uniform."""
        return {"exact_match": exact_match(text, example.reference)}


@dataclasses.dataclass(frozen=True)
class Gsm8k:
    """GSM8K (Cobbe et al. 2021): the final number of a worded calculation.

    path: a file .jsonl (question, answer), or a folder with test.jsonl and (for shots) train.jsonl.
    """

    path: Path
    num_shots: int = 5
    metrics: tuple[str, ...] = ("exact_match",)
    stop: tuple[str, ...] = ("Question:",)
    max_new_tokens: int = 256

    def examples(self) -> list[Example]:
        """Returns the questions of the split test, each with its answer, which ends in "#### NUMBER"."""

        def ask(question: str) -> str:
            return f"Question: {question.strip()}\nAnswer:"

        return few_shot_examples(self.path, self.num_shots, "question", "answer", ask)

    def score(self, example: Example, text: str) -> dict[str, float]:
        """Returns whether both texts end in the same number: that after "####", or else the last one."""
        wanted = final_number(example.reference)
        return {"exact_match": float(wanted is not None and final_number(text) == wanted)}


@dataclasses.dataclass(frozen=True)
class Custom:
    """Prompts and references of a JSONL file, {"prompt": TEXT, "reference": TEXT} per line, scored by one metric."""

    path: Path
    metric: str = "exact_match"
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 128

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def examples(self) -> list[Example]:
        """Returns the lines of the file, by their numbers."""
        examples = []
        for number, row in read_jsonl(self.path):
            place = f"{self.path}:{number}"
            examples.append(Example(str(number), text_of(row, "prompt", place), text_of(row, "reference", place)))
        if not examples:
            raise UserError(f'{self.path} holds no examples: put one {{"prompt": TEXT, "reference": TEXT}} per line')
        return examples

    def score(self, example: Example, text: str) -> dict[str, float]:
        """Returns the metric of this task."""
        return {self.metric: METRICS[self.metric](text, example.reference)}


def few_shot_examples(
    path: Path, num_shots: int, question_key: str, answer_key: str, ask: Callable[[str], str]
) -> list[Example]:
    """Returns the rows of the split test as examples, named by their numbers.

    num_shots: the first rows of the split train come before each prompt, with their answers. Without that split, in a
      single file for instance, they are the first rows of the test split, which are then no examples.
    ask: makes the prompt of a question, up to where the answer begins.
    """
    keys = (question_key, answer_key)
    rows = list(enumerate(read_split(path, "test", keys), 1))
    shots: list[dict[str, str]] = []
    if num_shots and path_of(path).is_dir() and (files := split_files(path, "train")):
        shots = [row for file in files for row in read_rows(file, keys)][:num_shots]
    elif num_shots:
        shots, rows = [row for _, row in rows[:num_shots]], rows[num_shots:]
    if len(shots) < num_shots or not rows:
        raise UserError(f"{path} has too few rows for {num_shots} shot(s) and an example: give a smaller --num_shots")
    before = "".join(f"{ask(row[question_key])} {row[answer_key].strip()}\n\n" for row in shots)
    return [Example(str(number), before + ask(row[question_key]), row[answer_key].strip()) for number, row in rows]
