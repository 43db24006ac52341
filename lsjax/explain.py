"""`layer_predictions`: what each layer thinks of a prompt and of its greedy continuation."""

import numpy as np

from lsjax.decoding.batch import Prompt, check_whole_number, encode_prompt, padded_length
from lsjax.decoding.forward import EXIT_ADAPTER
from lsjax.decoding.model import Model, check_model_type
from lsjax.decoding.strategies import INT8
from lsjax.evaluation.layers import predict_layers
from lsjax.generation import generate
from lsjax.reports.layer_predictions import LayerPredictions


def layer_predictions(model: Model, prompt: Prompt, max_new_tokens: int = 0) -> LayerPredictions:
    """Returns what every layer predicts at every position of a text: the paper's Figure 2.

    prompt: a text or a token list, read as `generate` reads it.
    max_new_tokens: the most tokens by which `generate` continues the prompt first, greedily. 0 reads the prompt alone.

    One pass reads the whole text with all exits. It computes with the weights that decode, and never holds the logits
    of more than 128 positions of one exit. Texts are padded to a power of two, so that new lengths seldom compile.
    An exit with an adapter predicts through it, as its drafts do.

    Raises UserError as `generate` does.
    """
    check_model_type(model)
    check_whole_number("max_new_tokens", max_new_tokens, least=0)
    text = encode_prompt(model, 0, prompt, int(max_new_tokens))
    prompt_length = len(text)
    if max_new_tokens:
        text = [*text, *generate(model, [text], max_new_tokens).tokens[0]]
    padded = np.zeros(padded_length(len(text)), np.int32)
    padded[: len(text)] = text
    adapter = model.exit_adapter and model.adapter_weights(model.exit_adapter.exit_layer)[EXIT_ADAPTER]
    found = predict_layers(
        model.decoder_weights(), padded, model.config, int8_cache=model.cache == INT8, exit_adapter=adapter
    )
    predicted, probabilities = (np.asarray(array)[:, : len(text)] for array in found)
    return LayerPredictions(predicted, probabilities, np.array(text, np.int32), prompt_length, model.tokenizer)
