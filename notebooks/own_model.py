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
# # Make your own model a LayerSkip model
#
# Takes any Llama in Hugging Face layout, continues it with LayerSkip on your text, shows every exit before and after,
# and hands it back: transformers then drafts with its early layers (`assistant_early_exit`).

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
import json
import os
from pathlib import Path

import jax
import numpy as np
from matplotlib import pyplot as plt

import lsjax
from lsjax.decoding.model import default_dtype
from lsjax.io.convert import convert

MODEL = os.environ.get("LSJAX_MODEL", "HuggingFaceTB/SmolLM2-135M")  # a name on the Hub, a folder, or a GGUF file
TEXT = os.environ.get("LSJAX_TEXT", "python")  # a folder of text files, a .jsonl file, or Python's standard library
STEPS = int(os.environ.get("LSJAX_STEPS", "60"))
WORKDIR = Path(os.environ.get("LSJAX_WORKDIR", "runs/own_model"))

print(f"Python {sys.version.split()[0]}, jax {jax.__version__}, lsjax {lsjax.__version__}")
print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, decoding in {np.dtype(default_dtype())}")

# %%
model = lsjax.load(MODEL)
model

# %% [markdown]
# ## Continue it with LayerSkip
#
# Exits from a third of the depth on take turns. Three times during the run, every exit is measured on text that is held
# out.

# %%
LAYERS = model.config.num_layers
EXIT = max(1, LAYERS // 3)
config = lsjax.default_config()
config.initial_model = str(MODEL)
config.model.update(lsjax.read_model_config(MODEL).to_dict())
config.data.corpus = TEXT
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
config.evaluation.update(max_batches=4, exit_stride=max(1, LAYERS // 6), every_steps=max(1, STEPS // 3))
result = lsjax.train(config, WORKDIR)
result.profile

# %% [markdown]
# ## Look at every exit over the run

# %%
evaluations = [json.loads(line) for line in (WORKDIR / "evaluations.jsonl").read_text().splitlines()]
for record in evaluations:
    plt.plot(list(map(int, record["loss"])), list(record["loss"].values()), "o-", label=f"step {record['step']}")
plt.gca().set(xlabel="exit layer", ylabel="held-out loss (nats per token)")
plt.legend()
plt.show()

# %% [markdown]
# ## Generate
#
# The same tokens, drafted by the early layers and verified by the others.

# %%
trained = lsjax.load(WORKDIR)
PROMPT = "import os\n\n\ndef list_files(folder):\n"
whole = lsjax.generate(trained, PROMPT, 48)
drafted = lsjax.generate(trained, PROMPT, 48, lsjax.SelfSpeculative(EXIT, 2))
print("the same tokens:", drafted.tokens == whole.tokens)
drafted

# %% [markdown]
# ## Hand it back to transformers

# %%
EXPORTED = WORKDIR / "huggingface"
if not EXPORTED.exists():
    convert(WORKDIR, EXPORTED, "huggingface")
sorted(path.name for path in EXPORTED.iterdir())

# %%
if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(EXPORTED, dtype=torch.float32)
    ids = torch.tensor([trained.tokenizer.encode(PROMPT)])
    settings = {"max_new_tokens": 48, "do_sample": False, "pad_token_id": 0}
    output = theirs.generate(ids, attention_mask=torch.ones_like(ids), assistant_early_exit=EXIT, **settings)
    continued = output[0, ids.shape[1] :].tolist()
    print("transformers, drafting with the same early layers, gives the same tokens:", continued == whole.tokens[0])
else:
    print("install torch and transformers to see the exported model draft there")
