"""A Llama forward pass in float64 numpy, written from the definitions and sharing no code with lsjax."""

import math

import numpy as np


def rms_norm(x, scale, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def rope_frequency(pair, config):
    """Returns the radians per position of one rotated pair, with Llama 3.1's scaling as in Meta's reference."""
    frequency = 1.0 / config.rope_theta ** (2 * pair / config.head_width)
    s = config.rope_scaling
    if s.kind == "linear":
        return frequency / s.factor
    if s.kind == "none":
        return frequency
    wavelength = 2 * math.pi / frequency
    if wavelength < s.original_context_length / s.high_frequency_factor:
        return frequency
    if wavelength > s.original_context_length / s.low_frequency_factor:
        return frequency / s.factor
    smooth = (s.original_context_length / wavelength - s.low_frequency_factor) / (
        s.high_frequency_factor - s.low_frequency_factor
    )
    return (1 - smooth) * frequency / s.factor + smooth * frequency


def rotate(vector, position, config):
    """Turns each pair (i, i + H/2) by position * frequency_i, with one complex multiplication."""
    half = config.head_width // 2
    turned = np.empty_like(vector)
    for i in range(half):
        z = complex(vector[i], vector[i + half]) * np.exp(1j * position * rope_frequency(i, config))
        turned[i], turned[i + half] = z.real, z.imag
    return turned


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attention(x, layer, positions, visible, config, held=lambda entries: entries):
    """Computes grouped-query attention for one sequence x [S,D].

    held: turns keys, and values, [S,H] into what a cache would return.
    """
    group = config.num_heads // config.num_kv_heads
    qkv = layer["attention"]["qkv"]
    out = np.zeros_like(x)
    for head in range(config.num_heads):
        kv, member = divmod(head, group)
        wq, wk, wv = qkv[:, kv, member], qkv[:, kv, group], qkv[:, kv, group + 1]
        q = np.stack([rotate(row @ wq, p, config) for row, p in zip(x, positions, strict=True)])
        k = np.stack([rotate(row @ wk, p, config) for row, p in zip(x, positions, strict=True)])
        k, v = held(k), held(x @ wv)
        for s in range(len(x)):
            seen = [c for c in range(s + 1) if visible(s, c)]
            weights = softmax(np.array([q[s] @ k[c] for c in seen]) / math.sqrt(config.head_width))
            out[s] += (weights @ v[seen]) @ layer["attention"]["output"][kv, member]
    return out


def feed_forward(x, layer):
    gate, up = x @ layer["feed_forward"]["gate_up"][:, 0], x @ layer["feed_forward"]["gate_up"][:, 1]
    return (gate / (1 + np.exp(-gate)) * up) @ layer["feed_forward"]["down"]


def hidden_states(params, tokens, config, layer_mask=None, positions=None, segments=None, held=lambda entries: entries):
    """Computes the state after each layer: tokens [S] -> [L,S,D]; layer_mask [L] multiplies what a layer adds."""
    params = _float64(params)
    positions = np.arange(len(tokens)) if positions is None else positions
    visible = (lambda s, c: True) if segments is None else (lambda s, c: segments[s] == segments[c])
    x = params["embed"][tokens]
    states = []
    for index in range(config.num_layers):
        layer = _layer(params["layers"], index)
        normed = rms_norm(x, layer["attention_norm"]["scale"], config.rms_norm_epsilon)
        attended = attention(normed, layer, positions, visible, config, held)
        normed = rms_norm(x + attended, layer["feed_forward_norm"]["scale"], config.rms_norm_epsilon)
        keep = 1.0 if layer_mask is None else layer_mask[index]
        x = x + keep * (attended + feed_forward(normed, layer))
        states.append(x)
    return np.stack(states)


def logits(params, x, config):
    """Computes g of Eq. 5: hidden states [...,D] -> logits [...,V]."""
    params = _float64(params)
    head = params["lm_head"] if "lm_head" in params else params["embed"].T
    return rms_norm(x, params["final_norm"]["scale"], config.rms_norm_epsilon) @ head


def cross_entropy(row, target):
    return math.log(np.exp(row - row.max()).sum()) + row.max() - row[target]


def _float64(tree):
    return {k: _float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}


def _layer(tree, index):
    return {k: _layer(v, index) if isinstance(v, dict) else v[index] for k, v in tree.items()}
