"""Lists a model's most frequent tokens, so that drafts can leave out the others.

The tokens of a corpus are counted, and the list is written beside the model as draft_vocabulary.json:

  lsjax draft_vocabulary --model=runs/demo
  lsjax draft_vocabulary --model=SmolLM2-135M-Instruct.Q4_1.gguf \\
    --corpus=texts.jsonl

--draft_vocabulary=8192 of generate and decode then drafts with the 8,192 most frequent tokens only. What is printed is
the share of held-out tokens that lists of several sizes cover: a token outside the list is never drafted, only
verified. Texts decide which tokens are frequent, so count texts like those that the model will write.
"""

from typing import TYPE_CHECKING

from lsjax.cli.flags import Arguments, CommandFlags
from lsjax.errors import UserError
from lsjax.files import path_of

if TYPE_CHECKING:
    from lsjax.config import DataConfig

_HELD_OUT = 0.1  # share of the documents of --corpus that coverage is measured on


def define_flags(flags: CommandFlags) -> None:
    """Defines the flags of this command."""
    flags.group("What to count")
    flags.path("model", None, "Training workdir, Hugging Face folder or GGUF file.", required=True)
    flags.path(
        "corpus",
        None,
        'A folder of text, a .jsonl file with one {"text": TEXT} per line, a .parquet file, or python, the standard '
        "library. Default: the corpus that the model was trained on, for a training workdir.",
    )


def main(arguments: Arguments) -> None:
    """Runs the command."""
    from lsjax.files import check_writable
    from lsjax.io.draft_vocabulary import list_path, write_list
    from lsjax.io.open import open_model
    from lsjax.tuning.token_counts import SIZES, count_tokens, coverage, rank_tokens

    source = open_model(arguments.model)
    path, tokenizer, vocab_size = list_path(arguments.model), source.tokenizer, source.config.vocab_size
    check_writable(path, "the list")
    data = _data(arguments)
    try:
        train, held_out = count_tokens(tokenizer, data, vocab_size)
    except UserError as error:
        message = str(error)
        raise UserError(message.replace("config.data.corpus", "--corpus") if arguments.corpus else message) from None
    texts = data.mixture or data.corpus
    ranked = rank_tokens(train, texts)
    sizes = [size for size in SIZES if size < vocab_size]
    for size, share in zip(sizes, coverage(ranked, held_out, tokenizer, sizes), strict=True):
        print(f"{size:>7,} tokens cover {share:6.1%} of {held_out.sum():,} held-out tokens")
    write_list(path, ranked)
    print(f"{path}: {len(ranked.ids):,} of {vocab_size:,} tokens, by {train.sum():,} tokens of {texts}")


def _data(arguments: Arguments) -> "DataConfig":
    """Returns where the texts are: --corpus, or else the corpus of the training run."""
    from lsjax.config import DataConfig
    from lsjax.io import workdir

    if arguments.corpus is not None:
        return DataConfig(corpus=arguments.corpus, held_out_fraction=_HELD_OUT)
    if not workdir.is_run(path_of(arguments.model)):
        raise UserError(f"give --corpus: {arguments.model} is not a training workdir, whose corpus could be counted")
    return workdir.read_config(path_of(arguments.model)).data
