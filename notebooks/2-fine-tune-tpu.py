# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Part 2 on a TPU: LoRA in Keras on JAX
#
# **The same fine-tuning on eight devices instead of one or two: the model is not made coarser, it is
# cut into pieces.**
#
# | | |
# |---|---|
# | accelerator | a Kaggle TPU with 8 cores; without one, 8 virtual devices on the CPU and a tiny Gemma |
# | time | 2 minutes of CPU time for a few steps (the run shown had to share its machine); not measured on a TPU |
# | reads | `training_data.csv` from {doc}`1-generate-data`, the base model as a Keras preset or a Hugging Face folder |
# | writes | `adapter/` with `adapter.lora.h5`, checkpoints and `history.csv`, and its manifest |
# | prerequisites | {doc}`2-fine-tune`: what LoRA is, and why the loss covers the answer only |

# %% [markdown]
# ## What is different here
#
# {doc}`2-fine-tune` makes Gemma-7b fit by storing it in 4 bits. A TPU has no such kernels, but it has eight cores with
# 16 GB each, joined by fast links. So the weights stay in 16 bits (17 GB) and are **sharded**: every core keeps an
# eighth of each large matrix. Three things follow, and this part is about them:
#
# * **where each weight lies**, which is a table that one writes (the *layout map*),
# * **shapes**: JAX compiles the training step for each shape that it meets, and compiling takes longer than computing,
# * **the mask**: in Keras, "answer only" is a weight on each position.

# %% [markdown]
# ## Set-up
#
# The number of devices is fixed when JAX is first imported. The flag below concerns the CPU only: where there is no
# TPU, it cuts the CPU into eight devices, and everything that follows runs as it would on eight cores.

# %%
import dataclasses
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
from promptrec.profiles import activate, find_result, get_profile, override
from promptrec.tables import versions

profile = activate(dataclasses.replace(get_profile(), rewriter="keras"))  # this part runs in Keras wherever it is
print("profile:", profile.name, "-", profile.where)
print("versions:", ", ".join(f"{name} {version}" for name, version in versions().items()))

# %%
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pandas as pd

from promptrec import lora_keras, plot_style, plots, splits
from promptrec.finetuning import finetune_file, settings_for
from promptrec.rewriters.keras_gemma import KerasGeneration, bucket_of, layout_table, load_gemma
from promptrec.tables import read_table

pd.set_option("display.max_colwidth", 90)
devices = keras.distribution.list_devices()
print(len(devices), "devices:", devices[0], "to", devices[-1])

# %% [markdown]
# ## Configuration
#
# `changes` is the place for your own settings; names and types are checked. Without a TPU a few steps have to do: they
# show that everything works, not what the method can reach.

# %%
seed = 0
on_kaggle = profile.name.startswith("kaggle")
adapter = Path(profile.out) / ("adapter" if on_kaggle else "adapter-keras")  # offline `adapter` is the torch one
few = {"rank": 4, "steps": 40, "evaluate_every": 20, "batch_size": 8, "accumulation": 1}
changes = {} if on_kaggle else {**few, "learning_rate": 5e-3, "max_tokens": 128, "validation_rows": 16}
settings = settings_for(profile, seed=seed, **changes)
columns = {"this run": dataclasses.asdict(settings), "7B on a TPU": dataclasses.asdict(lora_keras.V3_8)}
pd.DataFrame(columns).drop(index="target_layer_names").astype(str)  # both adapt all linear layers of a block

# %%
path = find_result(profile, "training_data.csv")  # in the output folder, or attached
data = splits.check_split(read_table(path))
train, validation = (data[data["split"] == side] for side in ("train", "validation"))
print(len(train), "training rows,", len(validation), "validation rows")

# %% [markdown]
# ## Sharding
#
# ### Two matrices, eight pieces, one sum
#
# A feed-forward block multiplies by a wide matrix, applies a function to each number, and multiplies by a tall matrix.
# Give each device some **columns** of the first and the same **rows** of the second: then a device can do both products
# alone, and the results only have to be added up. That sum is called an *all-reduce*, and it is the only time that the
# devices must talk.

# %%
rng = np.random.default_rng(seed)
x, wide, tall = rng.normal(size=(4, 256)), rng.normal(size=(256, 1024)), rng.normal(size=(1024, 256))
whole = np.maximum(x @ wide, 0) @ tall
pieces = zip(np.split(wide, 8, axis=1), np.split(tall, 8, axis=0))  # 128 columns, 128 rows a device
summed = sum(np.maximum(x @ columns, 0) @ rows for columns, rows in pieces)
print("largest difference:", f"{abs(summed - whole).max():.1e}")

# %% [markdown]
# Attention is cut the same way, by heads. Norms are small and lie on every device in full.
#
# ```{image} ../images/sharding.svg
# :alt: One transformer block over a mesh of eight cores. Query, key, value and gate matrices are split by columns, output and down matrices by rows, and an all-reduce adds the partial results.
# :width: 100%
# ```
#
# ### Mesh and layout map
#
# A *mesh* gives the devices names along axes: here one row of eight, with the axis `model` along it. A *layout map*
# says, for each kind of weight, which of its dimensions runs along which axis. `load_gemma` sets both before it reads
# the model, so that no device ever holds the whole:
#
# ```python
# # what promptrec.rewriters.keras_gemma.shard_over_devices does
# mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
# layout = keras.distribution.LayoutMap(mesh)
# layout["token_embedding/embeddings"] = ("model", None)
# layout[".*query/(kernel|lora_kernel_a)"] = ("model", None, None)
# layout[".*ffw_gating(_2)?/(kernel|lora_kernel_b)"] = (None, "model")
# ...
# keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"))
# ```
#
# `recompute` switches on gradient checkpointing: of each block only the input is kept for the backward pass.

# %%
model, tokenizer = load_gemma(profile.base_model, recompute=settings.gradient_checkpointing)
lora_keras.attach_lora(model, settings)
layout = layout_table(model)
layout[["weight", "count", "shape", "axes", "why"]]

# %% [markdown]
# The table is read from the arrays, not from the rules: this is where the weights **are**. A LoRA factor is cut like
# the kernel it stands beside, so it never has to be gathered. Now count what a device holds:

# %%
stored = sum(weight.value.nbytes for weight in model.weights) / 1e6
print(f"all weights {stored:.1f} MB, on each device {layout['bytes_per_device'].sum() / 1e6:.1f} MB")
print(f"Gemma-7b in 16 bits: {8.538e9 * 2 / 1e9:.1f} GB, an eighth of it {8.538e9 * 2 / 8 / 1e9:.1f} GB")

# %% [markdown]
# Of 16 GB a core then has nearly 14 left for activations, gradients and the adapter. One more condition hides in the
# table: what is cut must be divisible. Gemma-7b and our tiny one have as many key and value heads as query heads; where
# a model has a single one, as Gemma-2b, these two stay whole, and where the query heads do not divide, `layout_rules`
# refuses in one line.
#
# ## The mask is a weight
#
# The model reads tokens and is asked, at each position, for the next one. `batch_of` returns three arrays of one
# shape: tokens, next tokens, and a weight that is 1 where the next token belongs to the answer.

# %%
short = train.iloc[train["rewritten_text"].str.len().argsort()[: settings.batch_size]]
rows = lora_keras.encode_table(tokenizer, short, profile.chat, settings.max_tokens)
inputs, following, weights = lora_keras.batch_of(rows, settings.batch_size)
first, end = rows[0].answer - 1, len(rows[0].ids) - 1  # positions, from where it counts to where padding begins
seen = {"token": inputs["token_ids"], "next token": following}
strip = pd.DataFrame({name: [tokenizer.id_to_token(int(token)) for token in ids[0]] for name, ids in seen.items()})
print("shape:", weights.shape, "- positions that count:", int(weights.sum()))
strip.assign(weight=weights[0]).iloc[[*range(first - 3, first + 4), *range(end - 2, end + 2)]]

# %% [markdown]
# The request and the padding weigh nothing. The first answer token is predicted from the end of the request, so the
# weight begins one position **before** the answer, and it ends where `<end_of_turn>` has been predicted.
#
# Then there is a trap. Keras' losses divide by the number of positions unless told otherwise, and the request's
# positions, although they weigh nothing, are counted.

# %%
logits = model(inputs)  # [n, t, vocabulary]
for reduction in ("sum_over_batch_size", "mean_with_sample_weight"):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    print(f"{reduction:<24} {float(loss(following, logits, sample_weight=weights)):.4f}")

# %% [markdown]
# The first is the default. It divides by all positions, so a short answer in a long row hardly moves the weights, and
# the learning rate would depend on the padding. The second divides by the answer's tokens.
#
# ## The step
#
# In JAX a training step is a function of arrays: weights go in, loss and gradients come out. Written out:


# %%
def loss_of(trained: list, frozen: list, inputs: dict, following: np.ndarray, weights: np.ndarray) -> jax.Array:
    """Mean cross-entropy over the answer's tokens, as a function of the weights."""
    logits, _ = model.stateless_call(trained, frozen, inputs)  # [n, t, vocabulary]
    log_p = jax.nn.log_softmax(logits.astype("float32"))
    log_p = jnp.take_along_axis(log_p, following[..., None], axis=-1)[..., 0]  # [n, t]
    return -(log_p * weights).sum() / weights.sum()


step = jax.jit(jax.value_and_grad(loss_of))  # differentiated by its first argument: the adapter
trained, frozen = (
    [weight.value for weight in kind] for kind in (model.trainable_variables, model.non_trainable_variables)
)
for turn in ("first", "second", "third"):
    started = time.time()
    loss, gradients = jax.block_until_ready(step(trained, frozen, inputs, following, weights))
    print(f"{turn:<6} step: loss {loss:.4f}, {time.time() - started:.2f} s")
    trained = [weight - 0.5 * gradient for weight, gradient in zip(trained, gradients)]

# %% [markdown]
# The loss of the first step is the one above: same mask, same divisor. Nothing in this function mentions devices. The
# arrays carry their layout, the compiler (XLA) cuts the computation accordingly and inserts the sums. That work is why
# the first step takes so much longer than those after it.
#
# ## Compile once per bucket
#
# And it is done again for every new **shape**. Rows of a hundred different lengths would mean a hundred compilations,
# so each batch is padded to one of a few lengths, the *buckets*, and a batch holds rows of one bucket only.

# %%
sample = train.sample(min(len(train), 300), random_state=seed)
lengths = [len(row.ids) - 1 for row in lora_keras.encode_table(tokenizer, sample, profile.chat, 1024)]
buckets = pd.Series(lengths).groupby([bucket_of(length) for length in lengths]).agg(["size", "mean"])
buckets["padding"] = 1 - buckets["mean"] / buckets.index
buckets.rename_axis("bucket (tokens)").rename(columns={"size": "rows", "mean": "mean tokens"}).round(2)

# %% [markdown]
# A part of the work is padding; in return there are as many compilations as rows in this table, in training and again
# in generation. The same holds for the number of rows: a last, short batch is filled up with rows of weight 0.
#
# ## Train
#
# `finetune_file` is the function of {doc}`2-fine-tune`; under this profile it trains in Keras. As there, each
# evaluation writes a checkpoint and lets the model answer held-out rows, the checkpoint with the highest SCS is kept,
# and the same call goes on where a killed run stopped.

# %%
del model, step, trained, frozen, gradients, logits  # make room
started = time.time()
history = finetune_file(path, adapter, profile, seed=seed, **changes)
print(f"step {history['step'].max()} of {settings.steps} after {time.time() - started:.0f} s")
print("checkpoints:", sorted(path.name for path in (adapter / "checkpoints").glob("checkpoint-*")))
history.round(4)

# %%
again = finetune_file(path, adapter, profile, seed=seed, **changes)
print("nothing left to do; same history:", again.equals(history))

# %%
figure = plots.training_curves(history)
plot_style.alt_text(
    figure, "Training and held-out loss over the steps and, below, held-out SCS; the kept step is ringed."
)

# %% [markdown]
# Read the held-out loss: it falls when the adapter learns. SCS needs whole answers to be right and follows much later;
# how many steps that takes, {doc}`2-fine-tune` shows on the same data.
#
# ## What was written
#
# One small file of thin matrices. To see that it carries what was learnt, put it on a freshly read base and compute the
# held-out loss without and with it.

# %%
model, tokenizer = load_gemma(profile.base_model)
lora_keras.attach_lora(model, settings)
lora_keras.compile_for_training(model, settings)
watched = validation.sample(min(len(validation), settings.validation_rows), random_state=seed)
rows = lora_keras.encode_table(tokenizer, watched, profile.chat, settings.max_tokens)
for name, which in (("base alone", None), ("with the adapter", adapter)):
    lora_keras.use_adapter(model, which)
    print(f"{name:<17} held-out loss {lora_keras.evaluate(model, rows, settings.batch_size):.3f}")
print(f"{lora_keras.ADAPTER}: {(adapter / lora_keras.ADAPTER).stat().st_size / 1e3:.0f} kB")

# %% [markdown]
# And an answer, in the form that Part 3 uses. Generation is greedy, in batches of one size and one bucket:

# %%
look = watched.iloc[watched["original_text"].str.len().argsort()[:3]]
recoverer = lora_keras.KerasRecoverer(
    model, tokenizer, "fine-tuned", adapter=adapter, chat=profile.chat, settings=override(KerasGeneration())
)
pd.DataFrame({"true prompt": look["rewrite_prompt"], "answer": recoverer.recover(look)})

# %% [markdown]
# The file also works in torch, and one that torch trained works here:
#
# ```python
# from promptrec.adapters import keras_to_peft, peft_to_keras
# keras_to_peft("adapter/adapter.lora.h5", "peft-adapter", profile.base_model)
# ```
#
# ## Summary
#
# * Sharding keeps an eighth of each large matrix on each device; the layout map says how, and the table above is read
#   from the arrays.
# * The mask is a sample weight, and the loss divides by the answer's tokens.
# * Batches come in a few lengths, because each new shape is compiled anew.
# * Checkpoints, choice by SCS and resuming are those of Part 2; the adapter converts into peft's format and back.
#
# **How this differs from the tutorial it descends from.** That one used the TPU to generate data and fine-tuned on two
# T4. Here the whole series can run on the TPU, with every weight in memory once and not eight times.
#
# **Next:** {doc}`3-evaluate` loads this adapter under the TPU profile, and the torch one elsewhere.
