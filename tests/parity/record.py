"""Records small Llamas with what transformers computes on them, for tests that run without torch.

  python -m tests.parity.record

It writes tests/io/recorded/NAME/: the folder that transformers saved, and expected.npz.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from tests.helpers.llamas import make_llama, run_llama

FOLDER = Path(__file__).parent.parent / "io" / "recorded"
RECORDED = ("llama31", "multi_query", "smollm2", "linear_scaling", "llama32")


def record(variant: str) -> None:
    """Makes one variant and writes its folder and expected.npz."""
    folder = FOLDER / variant
    shutil.rmtree(folder, ignore_errors=True)
    model = make_llama(folder, variant)
    tokens = np.random.default_rng(1).integers(0, 288, (1, 80))
    logits, states = run_llama(model, tokens)
    greedy = model.generate(torch.as_tensor(tokens[:, :16]), max_new_tokens=24, do_sample=False)[0, 16:].numpy()
    # The last positions suffice, because they depend on all earlier ones.
    np.savez_compressed(
        folder / "expected.npz", tokens=tokens, logits=logits[:, -4:], states=states[:, :, -4:], greedy=greedy
    )
    if variant == "llama31":  # one folder spells the rotary embedding as transformers 4 did
        path = folder / "config.json"
        config = json.loads(path.read_text())
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        path.write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    for name in RECORDED:
        record(name)
