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
# # Preferences and reinforcement
#
# **Train on the score instead of the words: PPO, RLOO and DPO, from the base model and from the fine-tuned one.**
#
# | | |
# |---|---|
# | accelerator | none |
# | time | about a minute and a half on one CPU core; longer where Part 2 has left no adapter |
# | reads | the adapter of Part 2 and the triples of Part 1, where they are; else the shipped triples; `benchmarks/compare.json`, where the clone has it |
# | writes | `preference-answers.csv`: what each way answered, with its manifest |
# | prerequisites | {doc}`../2-fine-tune` |

# %% [markdown]
# ## The idea
#
# Fine-tuning teaches a model the words of the true prompt, one token after the other. The competition scores something
# else: how near the whole answer lies to the true prompt in an embedding space. Reinforcement learning can train on that
# figure itself, although it has no gradient: let the model answer, score the answer, and make good answers more likely.
# Preferences are a second way: of two answers, make the better one more likely than the worse one.
#
# * **PPO** with SCS as the reward was tried in the paper by Gan and others (on GPT-2); the reward did not rise.
# * **RLOO** draws several answers to each row and compares each with the mean of the others.
# * **DPO** needs no sampling while it trains, only pairs.
#
# All three run here on the tiny Gemma, for a few steps. Whether that is enough to learn anything is what the figures are
# for.
#
# :::{warning}
# Here the scorer is MiniLM, a proxy, the model has 4.5 million parameters, and a run has some dozens of answers to learn
# from. A real run has tens of thousands.
# :::

# %% [markdown]
# ## Set-up

# %%
from promptrec.doctor import devices
from promptrec.profiles import activate, describe, get_profile, override
from promptrec.tables import versions

profile = activate(get_profile())
print("profile:", profile.name, "-", profile.where)
print("devices:", devices())
print("versions:", ", ".join(f"{name} {version}" for name, version in versions().items()))

# %%
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from promptrec import plot_style, plots, ppo, preferences, rewards
from promptrec.comparison import compare
from promptrec.data import shipped_triples
from promptrec.findings import comparison_rows
from promptrec.lora import LoraSettings, finetune
from promptrec.methods import Task
from promptrec.tables import read_table, write_manifest, write_table

pd.set_option("display.max_colwidth", 90)
started = time.time()

# %% [markdown]
# ## Configuration
#
# * **test_rows**: held-out rows that every trained model answers at the end.
# * **steps**: optimiser steps of each run; `promptrec compare` takes more.
# * **first_steps**: steps of a small fine-tuning, where Part 2 has left no adapter to start from.


# %%
@dataclass(frozen=True)
class ReinforcementSettings:
    """How long each run is, and how much is answered."""

    test_rows: int = 90
    steps: int = 6
    first_steps: int = 60
    seed: int = 0


settings = override(ReinforcementSettings(), seed=0)
print(describe(settings))


# %%
def triples(split: str) -> pd.DataFrame:
    """Part 1's triples of a split, where Part 1 has run; else the shipped ones."""
    path = Path(profile.out) / "training_data.csv"
    table = read_table(path) if path.is_file() else shipped_triples([split])
    return table[table["split"] == split].sample(frac=1, random_state=settings.seed).reset_index(drop=True)


train, validation, test = triples("train"), triples("validation"), triples("test").head(settings.test_rows)
print(f"{len(train)} training triples, {len(validation)} held out to watch, {len(test)} to test on")

# %%
adapter = Path(profile.out) / "adapter"
if not (adapter / "adapter_model.safetensors").is_file():
    adapter = Path(profile.out) / "first-adapter"
    few = override(LoraSettings(), steps=settings.first_steps, evaluate_every=settings.first_steps)
    finetune(train, validation.head(16), profile.base_model, adapter, few, profile.chat)
task = Task(profile, train, validation, adapter, settings.seed)
print("starting from", adapter.name)

# %% [markdown]
# ## The reward, and what may not earn it
#
# The reward is the SCS of the answer as it would be handed in. A model that is rewarded by a figure finds what pleases the
# figure, and {doc}`what-the-metric-rewards` shows how much there is to find: words that lift any answer a little. So some
# words are **banned**: they are never generated, and an answer that holds one earns nothing. A blank answer earns nothing
# either; handed in, it would become a well-scoring constant, and saying nothing would be a way to win.

# %%
reward = rewards.ScsReward(task.scorer)
true_prompt = "Rewrite it as a sea shanty"
answers = [true_prompt, "Turn it into a sailor's song", "Improve this text", "Improve this lucrarea text", ""]
pd.DataFrame({"answer": answers, "reward": reward(answers, [true_prompt] * len(answers)).round(3)})

# %% [markdown]
# ## PPO in three pieces
#
# TRL no longer has a PPO, so `promptrec.ppo` holds a small one. Its three pieces:
#
# **Advantages.** Was a token better than expected? A *value head* guesses at every token what the answer will earn. The
# error at a token is what it earned plus what is expected after it, less what was expected before it; an advantage sums
# the errors that follow, each one discounted (Schulman et al., 2016).


# %%
import torch
from torch import Tensor


def advantages(  # same as promptrec.ppo.advantages
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float, smoothing: float
) -> Tensor:
    """Generalised advantages [n, a]: discounted sums of r(t) + discount v(t+1) - v(t), by (discount smoothing)^k.

    All arguments [n, a]; after an answer's end there is nothing to earn and nothing expected.
    """
    running, following, found = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0]), []
    for step in reversed(range(rewards.shape[1])):
        error = rewards[:, step] + discount * following - values[:, step]
        running = (error + discount * smoothing * running) * mask[:, step]
        following = values[:, step] * mask[:, step]
        found.append(running)
    return torch.stack(found[::-1], dim=1)


# %% [markdown]
# An answer of four tokens that earns 1 at its end, where .2 was expected all along: with smoothing 1 all tokens share the
# surprise, with less the last ones get more of it.

# %%
earned, expected, one = torch.tensor([[0.0, 0, 0, 1]]), torch.full((1, 4), 0.2), torch.ones(1, 4)
for smoothing in (1.0, 0.5, 0.0):
    print(f"smoothing {smoothing}:", advantages(earned, expected, one, 1.0, smoothing)[0].numpy().round(2))


# %% [markdown]
# **The clipped surrogate.** The same answers are used for more than one optimiser step, so the policy drifts away from
# the one they were drawn from. What a token can gain is limited to a probability ratio of 1 ± .2; beyond it there is no
# gradient (Schulman et al., 2017).
#
# **The KL penalty.** Every token pays `beta` times its log-ratio to the reference policy. It keeps the model near what it
# was, and it makes the optimum known: $p = q\, e^{r/\beta}/Z$. A toy of three tokens, with the reference $q$ uniform, must
# end there.


# %%
class ThreeTokens(torch.nn.Module):
    """A policy of one token out of three; what it may learn are three logits and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.value = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(1))
        self.path = []

    def sample(self, batch: int) -> ppo.Rollout:
        self.path.append(self.logits.softmax(-1).tolist())
        return ppo.Rollout(self.logits.softmax(-1).multinomial(batch, replacement=True)[:, None], torch.ones(batch, 1))

    def evaluate(self, rollout: ppo.Rollout) -> tuple[Tensor, Tensor]:
        return self.logits.log_softmax(-1)[rollout.answers], self.value.expand(rollout.answers.shape)

    def reference(self, rollout: ppo.Rollout) -> Tensor:
        return torch.full(rollout.answers.shape, -np.log(3.0))

    def groups(self) -> list[dict]:
        return [{"params": [self.logits], "lr": 0.02}, {"params": [self.value], "lr": 0.1}]


# %%
worth, beta = np.array([1.0, 0.5, 0.0]), 0.5
toy, known = ThreeTokens(), np.exp(worth / beta) / np.exp(worth / beta).sum()
torch.manual_seed(settings.seed)
options = override(ppo.PPOSettings(), beta=beta, epochs=4, at_once=256)
ppo.ppo(toy, [256] * 50, lambda rollout, _: worth[rollout.answers[:, 0].numpy()], options)
path = np.array(toy.path)
print("reached:", path[-10:].mean(0).round(2), " known optimum:", known.round(2))


# %%
def approach(path: np.ndarray, known: np.ndarray) -> Figure:
    """Probabilities [steps, 3] on their way to those known to be best [3]."""
    with matplotlib.rc_context(plot_style.STYLE):
        figure = Figure(figsize=(6.0, 3.2), layout="constrained")
        axes = figure.subplots()
        for token, (colour, line) in enumerate(zip(plot_style.PALETTE, ("-", "--", "-."))):
            label = f"token worth {worth[token]:.1f}"
            axes.plot(1 + np.arange(len(path)), path[:, token], color=colour, linestyle=line, label=label)
            axes.axhline(known[token], color=colour, linestyle=":", linewidth=1)
        axes.set(xlabel="step", ylabel="probability", ylim=(0, 1))
        axes.legend(loc="center right")
    ends = ", ".join(f"{end:.2f} (optimum {best:.2f})" for end, best in zip(path[-1], known))
    return plot_style.alt_text(
        figure, f"Probabilities of three tokens during PPO; they end at {ends}. Dotted: the optimum."
    )


approach(path, known)

# %% [markdown]
# ## From the base model, as in the paper
#
# Now the language model. A fresh adapter on the base model, four answers to each row, SCS at the last token. The paper
# saw a flat curve, and gives the reason: the model goes on with the story instead of writing a prompt, so hardly any
# answer earns more than another. What the reward has never seen, it cannot teach.

# %%
short = {"steps": settings.steps}
runs = {"PPO, base model": ppo.build(task, start="base", **short)}
told = pd.DataFrame(runs["PPO, base model"].history)
told.round(4)

# %% [markdown]
# ## From the fine-tuned model
#
# The fine-tuned model writes prompts, so its answers differ in what they earn. PPO goes on from there, with that model as
# the reference. A row can be easy or hopeless whatever the answer; to take that out, each reward is counted from the mean
# of the row's other answers.


# %%
import torch
from torch import Tensor


def less_row_mean(scores: Tensor, samples: int) -> Tensor:  # same as promptrec.ppo.less_row_mean
    """Scores [n], `samples` in a row to each request, less the mean of the request's other scores."""
    grouped = scores.view(-1, samples)
    others = (grouped.sum(1, keepdim=True) - grouped) / max(1, samples - 1)
    return (grouped - others).view(-1)


print("an easy row:    ", less_row_mean(torch.tensor([0.9, 0.8, 0.8, 0.7]), 4).numpy().round(2))
print("a hopeless row: ", less_row_mean(torch.tensor([0.0, 0.0, 0.1, 0.0]), 4).numpy().round(2))

# %% [markdown]
# With this baseline the value head has little left to say. **RLOO** (Ahmadian et al., 2024) leaves it out, and with it
# the clipping of single tokens: an answer is one action, its advantage is the line above. TRL's trainer does it.

# %%
runs["PPO, fine-tuned"] = ppo.build(task, start="tuned", **short)
runs["RLOO, fine-tuned"] = preferences.build_rloo(task, **short)


# %%
def curves(runs: dict[str, rewards.TunedRecoverer]) -> Figure:
    """Mean reward of the sampled answers at each step, with its bootstrap interval over the rows asked."""
    with matplotlib.rc_context(plot_style.STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for (name, run), colour, marker in zip(runs.items(), plot_style.PALETTE, plot_style.MARKERS):
            told = pd.DataFrame(run.history).dropna(subset=["mean"])
            axes.fill_between(told["step"], told["low"], told["high"], color=colour, alpha=0.15)
            axes.plot(told["step"], told["mean"], color=colour, marker=marker, markersize=4, label=name)
        axes.set(xlabel="optimiser step", ylabel="mean reward (0 to 1), with interval", ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="upper left")
    ends = "; ".join(
        f"{name} from {run.history[0]['mean']:.3f} to {run.history[-1]['mean']:.3f}" for name, run in runs.items()
    )
    return plot_style.alt_text(figure, f"Learning curves, mean reward of a step's answers: {ends}.")


curves(runs)

# %% [markdown]
# Read the bands before the lines: a step sees a handful of rows, and which rows they are moves the mean more than a step
# of training does. A curve rises only where its last bands lie above its first ones.

# %%
for name, run in runs.items():
    first, last = (pd.DataFrame(part).mean() for part in (run.history[:2], run.history[-2:]))
    above = run.history[-1]["low"] > run.history[0]["high"]
    print(f"{name:<18} first two steps {first['mean']:.4f}, last two {last['mean']:.4f}; "
          f"last band above the first: {'yes' if above else 'no'}; KL at the end {last['kl']:+.3f} nats a token")  # fmt: skip

# %% [markdown]
# ## Pairs: direct preference optimisation
#
# If the best policy under a KL penalty is $q\,e^{r/\beta}/Z$, then a policy *is* a reward: $r = \beta \log(p/q)$, up to a
# constant that cancels when two answers to the same row are compared. DPO (Rafailov et al., 2023) therefore fits $p$ to
# pairs as one would fit a reward model: the loss is $-\log\sigma\big(\beta\,[\log\tfrac{p}{q}(\text{chosen}) -
# \log\tfrac{p}{q}(\text{rejected})]\big)$.

# %%
gaps = torch.tensor([-10.0, 0.0, 10.0, 30.0])  # log(p/q) of the chosen answer less that of the rejected one
losses = -torch.nn.functional.logsigmoid(0.1 * gaps)
pd.DataFrame({"gap (nats)": gaps.numpy(), "loss": losses.numpy().round(3)})

# %% [markdown]
# Where do pairs come from? Two ways:
#
# * **its own samples**, ranked by their true SCS: the best against the worst of a row's answers, ties dropped;
# * **another model's guess** as the rejected answer and the truth as the chosen one, as in one of the competition's
#   notebooks. The other model here is the retrieval, which learned from other prompts.

# %%
options = override(preferences.DPOSettings(), rows=4)
rows = rewards.asked(train, profile.chat, options)
model, tokenizer = rewards.tunable(profile.base_model, adapter, options)
pairs = preferences.own_pairs(model, tokenizer, rows, reward, profile.chat, override(options, least_gap=0.0))
pairs.assign(truth=rows["rewrite_prompt"].to_numpy())[["truth", "chosen", "rejected"]]

# %%
watched = short | {"evaluate_every": settings.steps, "rows": 4 * settings.steps}
runs["DPO, own samples"] = preferences.build_dpo(task, **watched)
runs["DPO, another's guesses"] = preferences.build_dpo(task, pairs="other", **watched)


# %%
def preferred(runs: dict[str, rewards.TunedRecoverer]) -> Figure:
    """How much more than the starting model each DPO run prefers the chosen answers, by step."""
    with matplotlib.rc_context(plot_style.STYLE):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        for (name, run), colour, marker in zip(runs.items(), plot_style.PALETTE, plot_style.MARKERS):
            told = pd.DataFrame(run.history).dropna(subset=["margin"])
            axes.plot(told["step"], told["margin"], color=colour, marker=marker, markersize=4, label=name)
        axes.axhline(0, color=plot_style.GREY, linestyle=":")
        axes.set(xlabel="optimiser step", ylabel="margin: beta · gap (nats)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="upper left")
    ends = ", ".join(f"{name} {run.history[-1]['margin']:+.2f}" for name, run in runs.items())
    return plot_style.alt_text(figure, f"Margin of chosen over rejected answers by step; at the end: {ends}.")


preferred({name: run for name, run in runs.items() if name.startswith("DPO")})

# %% [markdown]
# A margin says how well the model tells the two apart, not how well it answers. Telling the truth from a guess can be
# easy for reasons that help no answer, such as their style or length; two answers of the model's own differ in little but
# the score. What counts are the answers: the rewards on held-out rows, at the first step and at the last.

# %%
for name, run in runs.items():
    if name.startswith("DPO"):
        points = [point for point in run.history if "mean" in point]
        told = "; ".join("step {step}: {mean:.4f} [{low:.4f}, {high:.4f}]".format(**point) for point in points)
        right = np.mean([point["accuracy"] for point in run.history if "accuracy" in point][1:])
        print(f"{name:<24} {told}; chosen preferred in {right:.0%} of the later pairs")

# %% [markdown]
# ## The same test rows for all
#
# Greedy answers of each trained model, beside those of the model that most of them started from, asked in the same way
# (texts and answers cut to the same length). The difference to that start is taken row by row.

# %%
options = override(preferences.RLOOSettings(), seed=settings.seed)
model, tokenizer = rewards.tunable(profile.base_model, adapter, options)
started_from = rewards.answering(task, "start", model.eval(), tokenizer, options)
seen = test.drop(columns="rewrite_prompt")
answered = {name: run.recover(seen) for name, run in {"fine-tuned (start)": started_from, **runs}.items()}
scores = pd.concat([
    test[["id", "prompt_cluster"]].assign(method=name, scs=task.scorer.scs(texts, test["rewrite_prompt"].tolist()))
    for name, texts in answered.items()
])  # fmt: skip
table = compare(scores, "fine-tuned (start)")
table.round(4)

# %%
differences = table[table["method"] != "fine-tuned (start)"]
plots.paired_differences(
    differences[["method"]].assign(
        **{ours: differences[name] for ours, name in
           {"mean": "difference", "low": "difference_low", "high": "difference_high"}.items()}
    )
)  # fmt: skip

# %% [markdown]
# What they say about the same three rows:

# %%
for number in range(min(3, len(test))):
    print("asked:", test["rewrite_prompt"][number])
    for name, texts in answered.items():
        print(f"   {name:<24} {texts[number][:90]}")

# %% [markdown]
# ## In the comparison of all methods
#
# The runs above are short, so that they can be watched. `promptrec compare` gives each method more steps, three seeds and
# more rows; its results are part of the repository. A method that was not run has no row.

# %%
names = ["zero-shot", "fine-tuned", "ppo-base", "ppo-tuned", "rloo", "dpo", "dpo-other"]
comparison_rows(names).round(4)

# %% [markdown]
# Two things to hold against any row of it. The budget is that of a laptop: a method that needs tens of thousands of samples
# cannot show what it is worth. And the start decides: where no answer of the starting model earns anything, no way of
# comparing its answers can help.
#
# ## What was written

# %%
out = Path(profile.out)
path = write_table(test[["id"]].assign(**answered), out / "preference-answers.csv")
write_manifest(
    path, started=started, profile=profile.name, seed=settings.seed, rows=len(test), settings=settings,
    scorer=task.scorer.name,
)  # fmt: skip
print(f"{path.name}: {len(test)} rows")
