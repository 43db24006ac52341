# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # LayerSkip in ten minutes
#
# A language model runs all of its layers for every token, although many tokens are known long before the last layer.
# [LayerSkip](https://arxiv.org/abs/2404.16710) trains a model so that its early layers can predict, and then decodes
# with them: the first layers draft a few tokens, the others verify them in one pass. The text stays the same.
#
# This notebook takes a real model with 30 layers, looks at what each layer thinks, decodes in three ways, trains the
# model a little with LayerSkip, and looks again. Choose *Run all*. A GPU helps and is not needed.

# %%
import importlib.metadata
import importlib.util
import subprocess
import sys

# Install before anything else is imported, so that a notebook service need not be restarted.
if importlib.util.find_spec("lsjax") is None:
    source = "lsjax[all] @ git+https://github.com/lsjax/lsjax"
    numpy = f"numpy=={importlib.metadata.version('numpy')}"  # other packages here were built for this one
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source, numpy], check=True)

# %%
import os
from pathlib import Path

import jax
import numpy as np
from matplotlib import pyplot as plt

import lsjax
from lsjax.decoding.model import default_dtype
from lsjax.experiments.pretrained import fetch_smollm2

MODEL = os.environ.get("LSJAX_MODEL") or fetch_smollm2(Path("models"))  # or a Hugging Face folder, or a GGUF file
STEPS = int(os.environ.get("LSJAX_STEPS", "60"))  # steps of training
WORKDIR = Path(os.environ.get("LSJAX_WORKDIR", "runs/tour"))

print(f"Python {sys.version.split()[0]}, jax {jax.__version__}, lsjax {lsjax.__version__}")
print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, decoding in {np.dtype(default_dtype())}")

# %% [markdown]
# ## A real model
#
# SmolLM2-135M-Instruct (Apache-2.0) has 30 layers and 135 million parameters. It was trained without LayerSkip.

# %%
model = lsjax.load(MODEL)
model

# %% [markdown]
# ## What each layer thinks
#
# Every layer's state can go through the model's last norm and head, as if that layer were the last one. Each row below
# is a layer and each column a position: the cell is the token that this layer would predict next. A layer that agrees
# with the last one is coloured.

# %%
PROMPT = "def fibonacci(n):\n    if n < 2:\n        return n\n    return"
before = lsjax.layer_predictions(model, PROMPT, max_new_tokens=8)
before

# %%
print(before.summary())

# %% [markdown]
# ## Three ways to decode
#
# *Autoregressive* runs all layers for each token. *Early exit* stops at one layer and gives another text. *Self-
# speculative* drafts with the early layers and verifies with the others: its greedy text is the autoregressive text.

# %%
NEW_TOKENS = 48
EXIT = max(1, model.config.num_layers // 3)
PROMPTS = [PROMPT, "import os\n\n\ndef list_files(folder):\n"]
autoregressive = lsjax.generate(model, PROMPTS, NEW_TOKENS)
early = lsjax.generate(model, PROMPTS, NEW_TOKENS, lsjax.EarlyExit(EXIT))
drafted = lsjax.generate(model, PROMPTS, NEW_TOKENS, lsjax.SelfSpeculative(EXIT, 3))
autoregressive

# %%
early

# %%
drafted

# %%
if default_dtype() == np.float32:  # in bfloat16, two nearly equal logits may swap
    assert drafted.tokens == autoregressive.tokens
print("the same tokens:", drafted.tokens == autoregressive.tokens)

# %% [markdown]
# ## Which setting would be fastest?
#
# `tune` decodes once, sees which drafts of every layer would be accepted, times a few programs on this machine, and
# predicts every setting. Drafts of a model that was not trained for it are rarely accepted, so nothing beats 1 yet.


# %%
def plot_settings(model, title):
    """Draws the predicted speed-up of every exit layer for three draft lengths."""
    tuning = lsjax.tune(model, PROMPTS, NEW_TOKENS)
    for drafts in (1, 3, 6):
        rows = [setting for setting in tuning.table if setting.num_speculations == drafts]
        plt.plot([row.exit_layer for row in rows], [row.speedup for row in rows], "o-", label=f"{drafts} draft(s)")
    plt.axhline(1, color="grey", linewidth=1)
    plt.gca().set(title=title, xlabel="exit layer", ylabel="speed-up over autoregressive", ylim=(0, None))
    plt.legend()
    plt.show()
    print(tuning)


plot_settings(model, "as published")

# %% [markdown]
# ## Train a little
#
# Continue the model with LayerSkip on the Python standard library. Exits from one third of the depth on take turns, and
# learn from the text and from the last layer. Interrupting the cell saves a checkpoint; running it again resumes.

# %%
config = lsjax.default_config()
config.initial_model = str(MODEL)
config.model.update(lsjax.read_model_config(MODEL).to_dict())
config.layerskip.update(
    dropout_max_rate=0.0,
    exit_first=EXIT,
    exit_scale=0.0,
    exit_weight_floor=0.1,
    exit_rotation=4,
    exit_distillation=1.0,
    exit_token_stride=4,
    exits_train_head=False,
)
config.training.update(
    total_steps=STEPS,
    batch_size=2,
    sequence_length=min(256, model.config.context_length),
    learning_rate=3e-4,
    warmup_steps=min(5, STEPS),
    weight_decay=0.0,
    loss_chunk=512,
    frozen="embed",
)
config.evaluation.update(max_batches=4, exit_stride=max(1, model.config.num_layers // 6))
result = lsjax.train(config, WORKDIR)
result.profile

# %% [markdown]
# ## Look again

# %%
trained = lsjax.load(WORKDIR)
after = lsjax.layer_predictions(trained, PROMPT, max_new_tokens=8)
after

# %%
print("before:", before.summary())
print("after: ", after.summary())
plot_settings(trained, f"after {STEPS} steps of LayerSkip")

# %% [markdown]
# A few minutes of training move the early layers towards the last one. A model that is faster for real needs hours on
# one GPU: `lsjax train --config=continual_smollm2_135m` is the start, and
# [the recipes](https://github.com/lsjax/lsjax/blob/main/docs/recipes.md) say which settings matter.
