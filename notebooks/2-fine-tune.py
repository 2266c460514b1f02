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
# # Part 2: Fine-tune with LoRA
#
# **Teach a language model to read the prompt off a pair of texts, on hardware that could not hold the model
# otherwise.**
#
# | | |
# |---|---|
# | accelerator | none (`local`: a tiny Gemma) · one CUDA GPU or 2xT4 for a 7B model · on a TPU: {doc}`2-fine-tune-tpu` |
# | time | 8 minutes on two CPU cores |
# | reads | `training_data.csv` from {doc}`1-generate-data`, the base model |
# | writes | `adapter/` with the LoRA weights, checkpoints and `history.csv`, and its manifest |
# | prerequisites | Part 1; what a neural network and a gradient are |

# %% [markdown]
# ## What fine-tuning is
#
# A *language model* predicts the next token (a word or a piece of one) from those before it. Its *weights* are the
# numbers that it learnt. To *fine-tune* is to go on training a finished model, the *base*, on examples of one task.
# Ours: given two texts, continue with the prompt.
#
# The obstacle is memory. Training every weight of Gemma-7b in 32 bits takes well over 100 GB, and a T4 has 16. Two
# ideas bring that down to what a T4 can hold: **quantisation** stores the base coarsely, **LoRA** trains a small
# addition instead of the base. Together they are called **QLoRA**. A third idea, **a loss on the answer only**, saves
# memory and, as a competitor reports, raises the score.

# %% [markdown]
# ## Set-up

# %%
from promptrec.doctor import devices
from promptrec.profiles import activate, find_result, get_profile
from promptrec.tables import versions

profile = activate(get_profile())
print("profile:", profile.name, "-", profile.where)
print("devices:", devices())
print("versions:", ", ".join(f"{name} {version}" for name, version in versions().items()))

# %%
import dataclasses
import gc
import tempfile
import time
from pathlib import Path

import bitsandbytes as bnb
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import norm
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from promptrec import lora, plot_style, plots, splits, templates
from promptrec.comparison import interval
from promptrec.finetuning import finetune_file, settings_for
from promptrec.inference import Constant, LanguageModelRecoverer
from promptrec.language_model import generate, load_model, load_tokenizer
from promptrec.scoring import profile_scorer
from promptrec.tables import read_table

pd.set_option("display.max_colwidth", 90)

# %% [markdown]
# ## Configuration
#
# What the run is given and where it writes. The hyper-parameters follow further down, after they have been explained.

# %%
out = Path(profile.out)
seed = 0
interrupt_after = 20.0  # seconds; the first training run is stopped on purpose, to show that it goes on
merge = profile.name == "local"  # a merged 7B model takes 17 GB of disk and is not needed by Part 3

# %% [markdown]
# ## The training data

# %%
path = find_result(profile, "training_data.csv")  # in the output folder, or attached
data = splits.check_split(read_table(path))
train, validation = (data[data["split"] == side] for side in ("train", "validation"))
data.groupby("split").agg(
    rows=("id", "size"), prompts=("rewrite_prompt", "nunique"), clusters=("prompt_cluster", "nunique")
)

# %% [markdown]
# `check_split` has passed: no prompt cluster and no original is on two sides. The model learns from `train`;
# `validation` watches it learn and chooses the checkpoint; `test` is not touched before {doc}`3-evaluate`.
#
# ## Before: what the base model answers
#
# A baseline comes before the improvement. We ask the base for the prompt of a few held-out pairs, the *watched* rows.
# This is the question, the same in training and at the test:

# %%
tokenizer, base = load_tokenizer(profile.base_model), load_model(profile.base_model)
settings = settings_for(profile, seed=seed)  # the profile's defaults; explained and changed below
watched = validation.sample(min(len(validation), settings.validation_rows), random_state=seed)
look = watched.head(3)
pairs = zip(look["original_text"], look["rewritten_text"], strict=True)
requests = [templates.recovery_request(original, rewritten, profile.chat) for original, rewritten in pairs]
print(requests[0])

# %%
raw = generate(base, tokenizer, requests, stop=templates.chat_of(profile.chat).after_model)
for prompt, answer in zip(look["rewrite_prompt"], raw, strict=True):
    print(f"PROMPT {prompt}\nBASE   {answer[:110]!r}\n")

# %% [markdown]
# The tiny Gemma has learnt to rewrite, and nobody has ever asked it for the prompt, so it answers beside the point. (A
# 7B chat model understands the question and answers vaguely; competitors report .51 to .61 on the leaderboard.) In
# numbers, beside a constant answer, which is the floor of every comparison. A *recoverer* is anything that takes such
# pairs and returns one prompt each; where a model says nothing, its recoverer answers with the constant, since one
# blank row would void a submission.


# %%
scorer = profile_scorer(profile)


def report(name: str, answers: list[str]) -> dict:
    """Mean SCS of the answers to the watched rows, with a bootstrap interval over prompt clusters."""
    values = scorer.scs(answers, watched["rewrite_prompt"].tolist())
    mean, low, high = interval(values, watched["prompt_cluster"])
    return {"answers by": name, "mean SCS": mean, "low": low, "high": high, "n": len(values), "scorer": scorer.name}


zero_shot = LanguageModelRecoverer(base, tokenizer, "base", chat=profile.chat)
scores = [report("constant", Constant().recover(watched)), report("base model", zero_shot.recover(watched))]
pd.DataFrame(scores).round(3)

# %% [markdown]
# Read `scorer` first: offline it is MiniLM, a proxy whose values lie far below those of the competition's sentence-t5.
# Compare rows of this table with each other and with nothing else.
#
# ## Quantisation: the base in 4 bits
#
# A weight usually takes 16 or 32 bits. To *quantise* is to keep, for each weight, only which of a few *levels* it is
# nearest to; with 16 levels that takes 4 bits. Two choices make it work well:
#
# * **Where the levels lie.** Trained weights are roughly normally distributed, so the levels are put at quantiles of a
#   normal distribution: dense around zero, where most weights are. That is *NormalFloat*, NF4.
# * **What they are multiplied by.** Each *block* of 64 weights has a scale of its own, its largest absolute value. One
#   outlier then spoils 64 weights, not a whole matrix.

# %%
edge = 0.9677083  # where the outermost quantile is taken, from the QLoRA paper
positive = norm.ppf(torch.linspace(edge, 0.5, 9)[:-1])
negative = -norm.ppf(torch.linspace(edge, 0.5, 8)[:-1])
nf4 = torch.tensor(sorted([*positive, 0.0, *negative]), dtype=torch.float32)
nf4 = nf4 / nf4.max()
print(" ".join(f"{level:.2f}" for level in nf4))
library = base.model.layers[0].self_attn.q_proj.weight.quant_state.code
print("same levels as in the loaded model:", torch.allclose(nf4, library.cpu(), atol=1e-4))


# %% [markdown]
# Sixteen levels, narrow steps around zero, wide ones outside. Quantising is then four lines:


# %%
def quantise(weight: torch.Tensor, levels: torch.Tensor, block: int = 64) -> torch.Tensor:
    """The matrix as it comes back after 4-bit storage: nearest level times the block's scale."""
    blocks = weight.reshape(-1, block)
    scale = blocks.abs().amax(1, keepdim=True)  # [blocks, 1]
    codes = (blocks / scale)[..., None].sub(levels).abs().argmin(-1)  # 0 to 15: 4 bits a weight
    return (levels[codes] * scale).reshape(weight.shape)


weight = base.get_input_embeddings().weight[:1024].detach().float().cpu()  # a real matrix of the base
even = torch.linspace(-1, 1, 16)
ways = {"even levels, one scale": (even, weight.numel()), "even levels, blocks": (even, 64), "NF4, blocks": (nf4, 64)}
for name, (levels, block) in ways.items():
    error = (quantise(weight, levels, block) - weight).square().mean().sqrt() / weight.std()
    print(f"{name:<22}  typical error: {error:.1%} of the spread of the weights")

# %% [markdown]
# Blocks bring the largest gain, normal levels some more. An error of about a tenth sounds large, but it is random and
# averages out over the hundreds of products that make up one activation. Our four lines do what the library does:

# %%
packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
theirs = bnb.functional.dequantize_4bit(packed, state)
print("largest difference to bitsandbytes:", f"{(quantise(weight, nf4) - theirs).abs().max():.1e}")
print(f"bits a weight: {4 + 32 / 64} plain, {4 + 8 / 64 + 32 / (64 * 256):.3f} with double quantisation")

# %% [markdown]
# The second line counts the scales too. A 32-bit scale for 64 weights adds half a bit to each. *Double quantisation*
# stores the scales themselves in 8 bits, in groups of 256, and nearly removes that.
#
# The real model, as it was loaded above:

# %%
count, embedding = base.num_parameters() / 1e6, base.get_input_embeddings().weight.numel() / 1e6
print(f"{count:.1f} million weights, {embedding:.1f} million of them in the embedding")
print(f"in 32 bits {count * 4:.1f} MB, in 16 bits {count * 2:.1f} MB, ", end="")
print(f"as loaded {base.get_memory_footprint() / 1e6:.1f} MB")
gemma = {"weights": 8.538e9, "embedding": 256_000 * 3072}
nf4_bytes = (gemma["weights"] - gemma["embedding"]) * 4.127 / 8 + gemma["embedding"] * 2
print(f"Gemma-7b: {gemma['weights'] * 2 / 1e9:.1f} GB in 16 bits, {nf4_bytes / 1e9:.1f} GB in NF4")

# %% [markdown]
# Only the linear layers are quantised; the embedding is not, and in a model as small as ours it is a large part.
# Gemma-7b shrinks to a third and fits on one T4.
#
# Storage is in 4 bits, **computing is not**: each matrix is unpacked to 16 or 32 bits in the moment it is multiplied.
# Quantisation therefore saves memory and costs a little time. And 4-bit weights cannot be trained: a gradient step is
# far smaller than the distance between two levels. Something else has to be.
#
# ## LoRA: train a small addition
#
# *Low-rank adaptation* leaves each weight matrix $W$ as it is and adds a product of two thin matrices:
#
# $$
# h = W x + \frac{\alpha}{r} B A x, \qquad A: r \times d_\text{in},\quad B: d_\text{out} \times r
# $$
#
# $r$ is the *rank*, a small number such as 16. Only $A$ and $B$ are trained; together they are called
# an *adapter*. $A$ starts random and $B$ at zero, so at the start the model is exactly the base.
#
# ```{image} ../images/lora.svg
# :alt: A large frozen matrix W and, beside it, the product of a tall thin matrix B and a low wide matrix A, both applied to the same input x and added up. W is stored in 4 bits, A and B are trained.
# :width: 100%
# ```


# %%
class LoraLinear(nn.Module):
    """W x + (alpha / rank) B A x: the linear layer is frozen, A and B are trained."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: int) -> None:
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / rank)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        return self.linear(x) + self.scale * (x @ self.A.T) @ self.B.T


torch.manual_seed(seed)
linear, x = nn.Linear(256, 768, bias=False), torch.randn(5, 256)
adapted = LoraLinear(linear, rank=16, alpha=32)
print("B = 0 leaves the layer as it is:", torch.equal(adapted(x), linear(x)))
trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
print(f"trained: {trained:,} of {linear.weight.numel():,}, {trained / linear.weight.numel():.0%}")

# %% [markdown]
# The share falls as matrices grow: $r (d_\text{in} + d_\text{out})$ against $d_\text{in} \cdot d_\text{out}$.
# The library [peft](https://huggingface.co/docs/peft) puts such layers into a whole model. It computes
# the same:

# %%
nn.init.normal_(adapted.B)  # as if trained
config = LoraConfig(r=16, lora_alpha=32, target_modules=["0"])
theirs = get_peft_model(nn.Sequential(nn.Linear(256, 768, bias=False)), config)
layer = theirs.base_model.model[0]
layer.base_layer.weight.data = linear.weight.data
layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = adapted.A.data, adapted.B.data
print("largest difference to peft:", f"{(adapted(x) - theirs(x)).abs().max():.1e}")

# %% [markdown]
# ## QLoRA: both
#
# The frozen $W$ in 4 bits, $A$ and $B$ in 32. What training needs beside the weights falls with the
# number of **trained** weights: a *gradient* for each, and two running means that the optimiser Adam keeps of it.
#
# ```{image} ../images/qlora-memory.svg
# :alt: Bars of the memory needed to fine-tune Gemma-7b. Full training in 32 bits needs over 100 GB, LoRA on a 16-bit base a little more than a T4 has, QLoRA about 6 GB.
# :width: 100%
# ```
#
# In our base, `attach_adapter` does both steps:

# %%
model = lora.attach_adapter(base, settings).eval()
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"trained: {trained / 1e6:.2f} million weights beside {count:.1f} million frozen ones")
print(f"the adapter on disk: about {trained * 4 / 1e6:.1f} MB")

# %% [markdown]
# In a tiny model an adapter is no small part. In Gemma-7b it is below one percent at rank 16; the next section counts.
#
# ## The hyper-parameters: what each means and what it costs
#
# *Hyper-parameters* are what a person sets before training.
#
# | name | meaning | costs memory? |
# |---|---|---|
# | `rank` | how rich the addition can be. Competitors found 1-4 as good as more | 16 bytes a trained weight, see below |
# | `alpha` | the addition is scaled by `alpha / rank`: a new rank needs no new learning rate | no |
# | `dropout` | share of the adapter's inputs set to zero at random in training; works against learning by heart | hardly |
# | `target_modules` | which matrices: attention (`q`, `k`, `v`, `o`), feed-forward (`gate`, `up`, `down`) | in proportion |
# | `learning_rate` | length of a training step. Adapters need about ten times that of full training | no |
# | `schedule`, `warmup` | how the rate moves: up over the first steps, then constant or down along a cosine | no |
# | `batch_size` | rows computed at once | **yes, activations grow with it** |
# | `accumulation` | batches whose gradients are added up before one step: a large batch for the memory of a small one | no |
# | `clip` | longest gradient allowed; longer ones are shortened, so that one odd batch does no damage | no |
# | `steps` | how often the weights are changed. Rows seen = steps x batch x accumulation | no |
# | `max_tokens` | longest row; longer texts are shortened, never the answer | **yes, activations grow with it** |
# | `optimizer` | Adam, or one that keeps its running means in 8 bits | 8 bytes a trained weight, or 2 |
# | `gradient_checkpointing` | forgets activations, computes them again when needed | saves most of them for a third more time |
#
# Rank is the one people turn up first. Counted for Gemma-7b:

# %%
hidden, heads, feed_forward, layers = 3072, 4096, 24576, 28  # Gemma-7b
a_layer = 4 * (hidden + heads) + 3 * (hidden + feed_forward)  # inputs + outputs of q, k, v, o and gate, up, down
ranks = pd.DataFrame({"rank": [1, 4, 16, 64]})
ranks["trained, millions"] = ranks["rank"] * a_layer * layers / 1e6
ranks["percent of all"] = ranks["trained, millions"] / 85.38
ranks["GB while training"] = ranks["trained, millions"] * 16 / 1e3
ranks.round(2)

# %% [markdown]
# Rank 64 needs some 3 GB beside the base, rank 16 a quarter of that, and even then less than one weight in a hundred is
# trained. (That is with Adam in 32 bits. The 8-bit one of the T4 settings takes 10 bytes a trained weight: 2 GB at rank 64.)
#
# Now set them. `changes` is the place for your own; names and types are checked.

# %%
changes = {}  # for example {"rank": 4, "steps": 800}
settings = settings_for(profile, seed=seed, **changes)
columns = {"this run": dataclasses.asdict(settings), "7B on T4": dataclasses.asdict(lora.T4)}
pd.DataFrame(columns).drop(index="target_modules").astype(str)  # both adapt all seven linear layers of a block

# %% [markdown]
# The T4 column is a 7B model's: small steps at a constant rate, one row at a time and eight accumulated, everything
# that saves memory switched on. A tiny model has to learn a new task almost from scratch, so its learning rate is an
# order of magnitude higher.
#
# ## A loss on the answer only
#
# The *loss* says how surprised the model was by the right next token: minus the logarithm of the probability that it
# gave to it. Training lowers it. But of which tokens? A row holds a request of hundreds of tokens and an answer of a
# dozen. With a loss on all of them, nearly all of the training goes into predicting the two texts, which at test time
# are **given**.
#
# ```{image} ../images/completion-mask.svg
# :alt: A training row as a strip of tokens. The request, with both texts, is masked with the label -100; only the tokens of the answer and the end-of-turn mark carry loss.
# :width: 100%
# ```
#
# So the request gets the *label* -100, which every loss function ignores. One competitor reports .51 with the loss on
# everything and .56 on the answer only.

# %%
short = train.iloc[train["rewritten_text"].str.len().argsort()[:4]]
rows = [lora.encode_row(tokenizer, row, profile.chat, settings.max_tokens) for _, row in short.iterrows()]
tokens = tokenizer.convert_ids_to_tokens(rows[0]["input_ids"])
strip = pd.DataFrame({"token": tokens, "label": rows[0]["labels"]})
print(len(strip), "tokens,", int((strip["label"] != -100).sum()), "with a loss")
strip.tail(int((strip["label"] != -100).sum()) + 4)

# %% [markdown]
# Everything up to the model's turn is masked. What remains is the prompt and `<end_of_turn>`: the model must also learn
# to **stop**.
#
# ### Why logits only where there is an answer
#
# The last layer turns each position's hidden state into *logits*, one number for every entry of the vocabulary. Gemma's
# has 256,000 entries. For a T4 that, not the weights, is the wall:

# %%
vocabulary, request, answer = 256_000, 1000, 24
for name, positions in [("all positions", request + answer), ("answer only", answer)]:
    print(f"{name:<14} {positions:>5} x {vocabulary:,} x 4 bytes = {positions * vocabulary * 4 / 1e9:.2f} GB a row")

# %% [markdown]
# And that several times over, for the gradient and for the copies made on the way. Masking alone does not help: it
# throws the loss away **after** the logits are made. The remedy is to pick the positions first:


# %%
import torch
from peft import PeftModel
from torch.nn import functional as F

from promptrec.errors import InputError


def answer_loss(  # same as promptrec.lora.answer_loss
    model: PeftModel, inputs: dict[str, torch.Tensor], count: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean cross-entropy over the answer's tokens, with logits at those positions only.

    inputs: input_ids, attention_mask, labels, each [n, t]. Hidden states [n, t, d] are indexed where the next label
    is not -100 -> [m, d], then lm_head -> [m, vocabulary]: m is some 20 a row instead of t.
    `count` overrides the divisor (gradient accumulation divides by the answer tokens of all its batches).
    """
    labels = inputs["labels"][:, 1:]
    answered = labels != -100
    if not answered.any():
        raise InputError("a batch has no answer tokens: the labels are all masked; check the template")
    base = model.get_base_model()
    hidden = base.model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
    ).last_hidden_state
    # of a model on two cards, the hidden states lie on the last one and the labels on the first
    logits = base.lm_head(hidden[:, :-1][answered.to(hidden.device)]).float()  # [m, vocabulary]
    total = F.cross_entropy(logits, labels[answered].to(logits.device), reduction="sum")
    count = answered.sum() if count is None else count
    return total / (count.to(total.device) if torch.is_tensor(count) else count)


# %% [markdown]
# Labels are shifted by one, since the state at a position predicts the **next** token. To check it, the four shortest
# rows, padded to one length, through the model's own loss and through ours:

# %%
ids, labels = (
    pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=value).to(model.device)
    for key, value in (("input_ids", tokenizer.pad_token_id), ("labels", -100))
)
batch = {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long(), "labels": labels}
with torch.inference_mode():
    print(f"full logits {model(**batch).loss:.5f}   answer only {answer_loss(model, batch):.5f}")
print("positions with logits:", labels.numel(), "and", int((labels[:, 1:] != -100).sum()))

# %% [markdown]
# The same loss from a small part of the logits. Three traps lie around here, and each has cost somebody a run:
#
# :::{tip}
# **The pad token.** Rows of a batch are filled up with a *pad* token, and its label is masked. Many recipes take
# the end-of-sequence token `eos` for it. Then the end of every answer is masked as well and the model never learns to stop.
# `load_tokenizer` makes sure that pad is a token of its own.
# :::
#
# :::{tip}
# **Which side.** A model generates after the last position. Rows filled up on the right end in padding, and the model
# continues that. Training may pad on the right, generating must pad on the **left**; `generate` does.
# :::
#
# :::{tip}
# **The end and the beginning.** Gemma closes a turn with `<end_of_turn>`, so training must include it and generation
# must stop at it. And Gemma needs its first token, `<bos>`, exactly once. Both are in `promptrec.templates` and
# `token_ids`, which training and asking share.
# :::

# %% [markdown]
# ## Train
#
# Two things happen at every evaluation.
#
# **A checkpoint is written**: adapter, optimiser, schedule, random state. A run that dies goes on from the last one as
# if nothing had happened.
#
# **The score is measured**: the model answers the watched rows, and the answers get their SCS. The checkpoint with the
# highest score is kept, not the one with the lowest loss. The loss is measured token by token along the true prompt; a
# model can become more certain of its wordings, its loss rise, and its answers still improve.
#
# The first call is stopped on purpose, as a session's end would stop it.

# %%
del model, base, zero_shot  # make room
gc.collect()
started = time.time()
adapter = out / "adapter"
history = finetune_file(path, adapter, profile, seed=seed, **{**changes, "time_budget": interrupt_after})
print(f"stopped at step {history['step'].max()} of {settings.steps} after {time.time() - started:.0f} s")
print("checkpoints:", sorted(path.name for path in (adapter / "checkpoints").glob("checkpoint-*")))

# %% [markdown]
# The same call again, without the limit. It finds the checkpoint and goes on:

# %%
started = time.time()
history = finetune_file(path, adapter, profile, seed=seed, **changes)
print(f"at step {history['step'].max()} of {settings.steps} after {(time.time() - started) / 60:.1f} minutes more")
history.dropna(subset=["scs"])[["step", "eval_loss", "scs"]].round(3)

# %% [markdown]
# The held-out loss falls, now and then with a small step back. Held-out SCS moves in jumps: few rows are watched, and naming
# the wrong kind of change costs a whole answer. Once more, now that all steps are done:

# %%
started = time.time()
again = finetune_file(path, adapter, profile, seed=seed, **changes)
print(f"nothing left to do, back after {time.time() - started:.0f} s; same history: {again.equals(history)}")

# %% [markdown]
# So the notebook can be run again without training twice. To train afresh, with other data or other settings, name
# another folder or delete this one.
#
# ## The curves

# %%
figure = plots.training_curves(history)
best = history.loc[history["scs"].idxmax()]
plot_style.alt_text(
    figure,
    "Training and held-out loss fall over the steps, steeply at first; below, held-out SCS rises unevenly; "
    f"its best value, {best['scs']:.3f}, is at step {best['step']:.0f}.",
)

# %% [markdown]
# Look at the distance between the two losses. Where the held-out one turns up while the training loss still falls, the
# model has begun to learn rows by heart: fewer steps, a lower rank or more distinct prompts help. The ring marks the
# step that was kept.
#
# ## After: what it answers now

# %%
model, tokenizer = lora.load_adapters(profile.base_model, {"best": adapter})
recoverer = LanguageModelRecoverer(model, tokenizer, "fine-tuned", adapter="best", chat=profile.chat)
after = recoverer.recover(watched)
for prompt, answer in zip(look["rewrite_prompt"], after, strict=False):  # the first three
    print(f"PROMPT {prompt}\nNOW    {answer}\n")

# %% [markdown]
# It now answers with a prompt, in a form that a person might have typed, and stops. It need not be the right one. Over
# all watched rows:

# %%
scores.append(report("fine-tuned", after))
pd.DataFrame(scores).round(3)

# %% [markdown]
# The fine-tuned model is ahead of its base and of the constant on rows whose prompts it has never seen. The number is a
# little too good: these rows chose the checkpoint. {doc}`3-evaluate` measures on rows that chose nothing. (The curve may
# show another value for the same adapter and rows: on a CPU 4-bit products round by how rows are batched, and now and then
# one of the answers comes out differently.)
#
# ## Several adapters on one base
#
# An adapter is a small file; the base stays as it is. Several can lie on one base, and switching takes no time: one
# base in memory serves many tasks. As a second one we take a checkpoint other than the best.

# %%
checkpoints = sorted((adapter / "checkpoints").glob("checkpoint-*"))
other = next((folder for folder in checkpoints if folder.name != f"checkpoint-{best['step']:.0f}"), checkpoints[0])
model, tokenizer = lora.load_adapters(profile.base_model, {"best": adapter, "other": other})
model.add_weighted_adapter(["best", "other"], [0.5, 0.5], "mixed", combination_type="cat")
print("adapters:", list(model.peft_config), "- the second is", other.name)


# %%
def loss_now() -> str:
    """Loss on the four short rows with whatever adapter is active."""
    with torch.inference_mode():
        return f"{answer_loss(model, batch):.3f}"


for name in ("best", "other", "mixed"):
    model.set_adapter(name)
    print(f"{name:<6}", loss_now())
with model.disable_adapter():
    print("none  ", loss_now())

# %% [markdown]
# Four models from one base: switched by `set_adapter`, averaged by `add_weighted_adapter`, and with `disable_adapter`
# the untouched base, whose loss is far higher. `"cat"` averages the additions $B A$ themselves, by putting the thin
# matrices side by side (the rank doubles). `"linear"` averages $A$ and $B$ one by one and multiplies afterwards, which is
# something else: here it would have doubled the addition.
#
# ## Merge
#
# $W + \frac{\alpha}{r} B A$ is a matrix like $W$. To *merge* is to compute it once and save a plain model
# that needs no peft. The adapter goes into the **full-precision** base: merged into the 4-bit one, the sum would have
# to be rounded to 16 levels again.

# %%
if merge:
    whole, tokenizer = lora.load_adapters(profile.base_model, {"best": adapter}, quantise=False)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        lora.merge_adapter(profile.base_model, adapter, folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 1e6
        merged = load_model(folder, quantise=False)
        separate, together = whole(ids).logits, merged(ids).logits
    print(f"merged model: {size:.1f} MB; largest difference of its logits: {(separate - together).abs().max():.1e}")
    agree = (separate.argmax(-1) == together.argmax(-1)).float().mean()
    print(f"same next token at {agree:.1%} of the positions")

# %% [markdown]
# Up to rounding the merged model computes the same. Keep the adapter all the same: it is small, it can be switched, and
# it runs on the 4-bit base.
#
# ## Watching from elsewhere
#
# By default nothing is sent anywhere: `report_to` is `"none"`. One setting changes that.
#
# ```python
# changes = {"report_to": "tensorboard"}   # then: tensorboard --logdir adapter/checkpoints
# changes = {"report_to": "wandb"}         # pip install wandb, wandb login, and a network
# ```
#
# ## The same on other machines
#
# **2xT4 on Kaggle.** The code is the code above; what changes is the profile, which Kaggle's folders select by
# themselves. It brings Gemma-7b, the T4 column of the table, 16-bit computing, half of the layers on each card and the
# sentence-t5 scorer.
#
# ```python
# profile = activate(get_profile("kaggle-t4x2"))
# finetune_file("/kaggle/working/training_data.csv", "/kaggle/working/adapter", profile)
# ```
#
# A T4 computes in float16. Newer cards have bfloat16, which is more forgiving; torch says that a T4 has it as well, and
# means a slow emulation. `compute_dtype` decides by the card's generation.
#
# **A TPU, with Keras on JAX.** The model is not quantised there but cut into eight pieces, the mask is a weight, and
# the step is compiled once for each length. {doc}`2-fine-tune-tpu` shows it; it takes this part's place under the
# profile `kaggle-tpu`.
#
# ## What was written

# %%
for name in ("adapter/adapter_model.safetensors", "adapter/history.csv", "adapter.manifest.json"):
    print(f"{(out / name).stat().st_size / 1e3:>8.0f} kB  {name}")

# %% [markdown]
# Part 3 needs the first file and the base; the manifest says how it came to be.
#
# ## Summary
#
# * The base is stored in 4 bits, NF4 in blocks of 64, and stays frozen; two thin matrices beside each of its own are
#   trained.
# * Loss and logits cover the answer only: the same loss, a fraction of the memory.
# * Training survives a kill, and the checkpoint that **answers** best on held-out prompt clusters is kept.
# * Adapters are switched, averaged, turned off or merged; the base serves them all.
#
# **How this differs from the documents it descends from, and why.** The tutorial trained at rank 64 for 525 steps of 1
# x 8 rows, with logits for whole sequences, in about six hours on two T4, and saved by the number of steps. Here logits
# are computed where the answer is, and held-out SCS chooses the checkpoint. The paper computed the loss on the whole
# text; its Gemma-2B scored .569 on 1,000 rows after 5 epochs and .437 to .506 on 8,000 rows after 1 to 15, and its
# authors saw the model learn the two texts instead of the task. That is what the mask is for. Rank, learning
# rate, batch and steps of the T4 settings are the tutorial's.
#
# **Next:** {doc}`3-evaluate` compares this model with everything else, on rows nobody has touched, and writes the
# submission.
