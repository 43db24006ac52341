"""A model of lsjax for lm-evaluation-harness, at its last layer or at an exit (the extra `harness`).

from lm_eval import simple_evaluate
from lsjax.experiments.harness import HarnessModel
results = simple_evaluate(model=HarnessModel("runs/demo", exit_layer=2), tasks=["hellaswag"])
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lsjax.data.tokenizer import token_text
from lsjax.decoding.batch import check_whole_number
from lsjax.decoding.model import Model, load
from lsjax.decoding.strategies import AUTOREGRESSIVE, EarlyExit, Sampling, Strategy, check_strategy
from lsjax.errors import UserError
from lsjax.evaluation.likelihood import Likelihood, continuation_likelihoods
from lsjax.generation import generate

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError:
    raise UserError(
        "lm-evaluation-harness is not installed: pip install 'lm-eval>=0.4.10', or install lsjax[harness]"
    ) from None

_NEW_TOKENS = 256  # where a task does not say


class HarnessModel(TemplateLM):
    """A model as lm-evaluation-harness asks for it.

    model: a loaded model, or a path for `load`.
    exit_layer: the exit whose predictions count, for likelihoods and for generated texts; None means the last layer.
    strategy: how texts are generated at the last layer, such as SelfSpeculative(8, 6), which has the same greedy text.
    batch_size: texts side by side.

    Contexts begin with the token that opens a text, if the tokenizer has one. The name of a special token in a text is
    plain text. Chat templates are not supported.
    """

    def __init__(
        self,
        model: Model | str | Path,
        exit_layer: int | None = None,
        strategy: Strategy = AUTOREGRESSIVE,
        batch_size: int = 8,
    ):
        super().__init__()
        check_whole_number("batch_size", batch_size, least=1)
        self.model = model if isinstance(model, Model) else load(model)
        if exit_layer is not None:
            if strategy != AUTOREGRESSIVE:
                raise UserError("exit_layer evaluates an exit alone, so it goes with no other strategy")
            strategy = EarlyExit(exit_layer)
        check_strategy(strategy, self.model.config.num_layers)
        self.exit_layer, self.strategy, self.batch_size = exit_layer, strategy, batch_size
        self._params = self.model.stack_params()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.model.tokenizer.stop[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the one that opens a text, or else the one that ends it.

        As in lm-eval's own models, a tokenizer's bos_token counts even where the tokenizer puts it before no text.
        """
        tokenizer = self.model.tokenizer
        if tokenizer.begin is not None:
            return tokenizer.begin
        bos = tokenizer.backend.token_to_id(token_text(tokenizer.settings.get("bos_token")) or "")
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads."""
        return self.model.config.context_length

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in caches of requests."""
        return self.model.path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the tokens of a text, after the token that opens one unless `add_special_tokens` is False."""
        tokens = self.model.tokenizer.encode(string)
        opened = self.model.tokenizer.begin is not None
        return tokens[1:] if opened and add_special_tokens is False else tokens

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > self.max_length:
            raise UserError(f"a continuation has {longest} tokens, but the model's context is {self.max_length}")
        found = [(total, is_greedy) for total, is_greedy in self._likelihoods(pairs)]
        for (texts, *_), likelihood in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, likelihood)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text, read in windows that predict every token once."""
        pairs, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, likelihood in zip(owners, self._likelihoods(pairs), strict=True):
            totals[owner] += likelihood.log_likelihood
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the continuation of each context, up to the first text of `until`."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(index)
        texts: dict[int, str] = {}
        for settings, indices in groups.items():
            contexts = [requests[index].args[0] for index in indices]
            for index, text in zip(indices, self._generate(contexts, json.loads(settings)), strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return [texts[index] for index in range(len(requests))]

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        settings = dict(normalize_gen_kwargs(settings, _NEW_TOKENS))
        new_tokens = settings.pop("max_gen_toks")
        room = self.max_length - new_tokens
        if room < 1:
            raise UserError(f"max_gen_toks {new_tokens} leaves no room for a prompt in a context of {self.max_length}")
        stop = [text for text in settings.pop("until") if text]
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        result = generate(
            self.model,
            prompts,
            max_new_tokens=new_tokens,
            strategy=self.strategy,
            sampling=_sampling(settings),
            stop=stop,
            batch_size=self.batch_size,
        )
        return result.text

    def _likelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        return continuation_likelihoods(
            self._params,
            self.model.config,
            pairs,
            exit_layer=self.exit_layer,
            batch_size=self.batch_size,
            exit_adapter=self.model.exit_adapter,
        )


def _sampling(settings: dict[str, Any]) -> Sampling:
    """Returns how a task's normalised generation_kwargs, without lengths and stop texts, want tokens to be drawn."""
    unknown = set(settings) - {"do_sample", "temperature", "top_k", "top_p", "num_beams"}
    if unknown or settings.get("num_beams", 1) != 1:
        name = min(unknown, default="num_beams")
        raise UserError(f"generation_kwargs: {name} {settings[name]} is not supported")
    temperature = float(settings.get("temperature", 0.0))
    if temperature == 0:
        return Sampling()
    return Sampling(temperature, int(settings.get("top_k", 0)), float(settings.get("top_p", 1.0)))
