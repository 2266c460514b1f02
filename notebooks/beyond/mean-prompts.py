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
# # Mean prompts
#
# **One string that answers every row: what it can score, how to search for it, and how not to fool oneself.**
#
# | | |
# |---|---|
# | accelerator | none |
# | time | about a minute on two CPU cores |
# | reads | the shipped prompts; optionally a sentence-t5 |
# | writes | `mean-prompts.csv`, one row for each string found, with its manifest |
# | prerequisites | {doc}`../3-evaluate` up to the best constant |

# %% [markdown]
# ## The idea
#
# In {doc}`../3-evaluate` the number to beat was the *best constant*: the training prompt that scores best as the
# answer to all the others. But why should the constant be a prompt that somebody wrote? The scorer takes any string.
# A **mean prompt** is a string built for one purpose: a high average score against all prompts at once.
#
# On the leaderboard the sentence *"Improve the text to this."* had .60, searched mean prompts .69 to .70, and 7B models
# asked without examples .51 to .61. A string that ignores the texts beat models that read them.
#
# :::{warning}
# Here the scorer is MiniLM, a proxy. Its scores are far below those of sentence-t5 (.12 where that one says .62), so
# nothing below compares with a leaderboard. A string found under one encoder is not a mean prompt of another.
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
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from promptrec import plot_style, plots
from promptrec.comparison import interval
from promptrec.mean_prompt import halves
from promptrec.probes import probe_weights
from promptrec.prompt_bank import shipped_prompts
from promptrec.scoring import get_scorer
from promptrec.search_encoders import encoder_of
from promptrec.tables import write_manifest, write_table
from promptrec.token_search import METHODS, Objective, SearchSettings, search

pd.set_option("display.max_colwidth", 110)
started = time.time()

# %% [markdown]
# ## Configuration
#
# * **prompts**: how many shipped prompts take part. Half are searched with, half judge.
# * **evaluations**: the budget of every search: how many distinct strings it may have encoded exactly.
# * **candidates**: strings that a step may have encoded. Small budgets want small steps: in a trial with steps of 64,
#   the gradient search was at 500 evaluations no better than random edits.
# * **sentence_t5**: a folder with sentence-transformers/sentence-t5-base, or its TensorFlow SavedModel. Only the last
#   section uses it; without it, that section says so and does nothing.


# %%
@dataclass(frozen=True)
class MeanPromptSettings:
    """How much is searched."""

    prompts: int = 800
    evaluations: int = 500  # of each method in the comparison
    short_search: int = 250  # of each search in the other sections
    candidates: int = 32
    steps: int = 12  # of the search written out in this notebook
    sizes: tuple[int, ...] = (10, 40, 150)  # searched prompts, beside all of them
    probes: int = 16
    sentence_t5: str = ""
    seed: int = 0


settings = override(MeanPromptSettings(), seed=0)
print(describe(settings))

# %% [markdown]
# ## Two halves
#
# A search that looks at prompts will fit those prompts. So half of them are searched with and the other half judges,
# and no near-copy of a searched prompt is among the judges: prompts are clustered, and whole clusters change sides.

# %%
scorer = get_scorer("minilm")
encoder = encoder_of(scorer)
table = shipped_prompts().sample(settings.prompts, random_state=settings.seed)
prompts, taxonomy = table["rewrite_prompt"].tolist(), table["taxonomy"].to_numpy()
vectors = scorer.encode(prompts)  # [n, d], unit length
clusters, searched = halves(prompts, settings.seed)
train, held = vectors[searched], vectors[~searched]
print(f"{len(train)} prompts to search with, {len(held)} to judge, {len(set(clusters))} clusters; {scorer.name}")

# %%
records = {}


def keep(name: str, vector: np.ndarray, text: str = "") -> pd.DataFrame:
    """Note what an answer's vector [d] scores on both halves; return all that was noted so far."""
    mean, low, high = interval((held @ vector) ** 3, clusters[~searched])
    searched_mean = float(((train @ vector) ** 3).mean())
    records[name] = {"searched": searched_mean, "mean": mean, "low": low, "high": high, "text": text}
    return pd.DataFrame.from_dict(records, orient="index").round(4)


# %% [markdown]
# ## What can one answer score?
#
# ### The best constant
#
# Every searched prompt as the answer to all searched prompts: one matrix product.

# %%
means = ((train @ train.T) ** 3).mean(1)
options = [prompt for prompt, chosen in zip(prompts, searched) if chosen]
constant = options[means.argmax()]
keep("best constant", train[means.argmax()], constant)

# %% [markdown]
# ### The best vector
#
# Forget strings for a moment. Which *unit vector* $v$ has the highest mean score $f(v) = \frac1n\sum_i (v \cdot t_i)^3$
# against the prompt vectors $t_i$? No string can beat it, because a string is only a way to reach some vector.
#
# For the plain cosine the answer would be the direction of the mean of all $t_i$. The cube changes that. At the best
# point of the unit sphere, $v$ must point along the gradient of $f$, which is $3\cdot\frac1n\sum_i (v \cdot t_i)^2\, t_i$:
# again a mean of the prompt vectors, but each counts by its **squared cosine** with $v$. So one can start at the plain
# mean and repeat: weigh the prompts by how near they are, take the mean again. (As $f$ is a third-order tensor applied
# to $v$ three times, this is known as the tensor power method.) Prompts that are far off anyway are given up in favour
# of those that can be won.

# %%
vector = train.mean(0)
vector /= np.linalg.norm(vector)
keep("mean vector", vector)
for step in range(101):
    if step in (0, 1, 2, 5, 10, 20, 50, 100):
        print(f"after {step:>3} steps: {((train @ vector) ** 3).mean():.5f}")
    vector = ((train @ vector) ** 2) @ train
    vector /= np.linalg.norm(vector)

# %% [markdown]
# The value never falls, but one start may end on a lesser hill. `Objective.best_vector` climbs from several: the mean,
# some prompts, the best one.

# %%
objective = Objective.mean(train)
best_vector, _ = objective.best_vector(settings.seed)
keep("best vector", best_vector)

# %% [markdown]
# The first row is what a person would have found by trying prompts, the last what is left to win. *Searched* is the
# score on the prompts that were looked at, *mean* the score on the others, with its interval.

# %% [markdown]
# ## A step of the search
#
# A string is changed by replacing a token, and the vocabulary has tens of thousands. Encoding each of them at each
# place to see which helps is a great many encodings. The gradient does it in one go: **one backward
# pass** gives, at every token $x$ of the string, the direction $g$ in which its input embedding should move. Putting the
# token $v$ in its place moves the embedding by $v - x$, so the score should change by about $(v - x)\cdot g$, for all
# tokens and all places one product of matrices (HotFlip, Ebrahimi et al. 2018; GCG, Zou et al. 2023).
#
# It is an estimate, and a rough one: tokens lie far apart, and the encoder is not linear. So the best few are encoded
# **exactly, from their text**, and a change is accepted only if the score has really risen.

# %%
used = set(" ".join(options).lower().split())  # words of the searched prompts
words = [word for word in encoder.whole_words() if word in used and len(encoder.token_ids(word)) == 1]
word_table = encoder.embedding_matrix[[encoder.token_ids(word)[0] for word in words]]  # [V, D]


def replacements(text: str, count: int = 4) -> pd.DataFrame:
    """At every place the words that promise most instead of the token there: new texts with the estimated gain."""
    pieces, ids = encoder.tokens(text), list(encoder.token_ids(text))
    _, (slopes,) = encoder.gradient([ids], [objective])  # [t, D]
    gains = slopes @ word_table.T - (slopes * encoder.embedding_matrix[ids]).sum(1, keepdims=True)  # [t, V]
    best = np.argsort(-gains, axis=1)[:, :count]  # [t, count]
    rows = [
        (encoder.join([*pieces[:at], words[new], *pieces[at + 1 :]]), gains[at, new])
        for at, news in enumerate(best)
        for new in news
    ]
    return pd.DataFrame(rows, columns=["text", "estimated"])


# %%
text = "Turn this into a sea shanty with a call and response"
ranking = replacements(text)
floor = objective.value(encoder.encode([text]))[0]
ranking["exact"] = objective.value(encoder.encode(ranking["text"].tolist())) - floor
print(f"{len(words):,} words in {len(encoder.tokens(text))} places, from one backward pass; score now {floor:.4f}")
print(f"of the {len(ranking)} most promising, {(ranking['exact'] > 0).sum()} really raise it; correlation of estimate "
      f"and exact gain {ranking['estimated'].corr(ranking['exact']):.2f}")  # fmt: skip
ranking.nlargest(6, "exact").round(4)

# %% [markdown]
# From a string this far from the mean of all prompts almost any promised change is a real one. ("shanty" is two tokens
# to MiniLM, so half of it may be replaced.) Now the loop: rank, encode, accept the best if it rises, again.

# %%
for step in range(settings.steps):
    candidates = replacements(text)["text"].tolist()
    values = objective.value(encoder.encode(candidates))
    if values.max() <= floor:
        print("no candidate raises it:", (values > floor).sum(), "of", len(values))
        break
    text, floor = candidates[values.argmax()], values.max()
    print(f"step {step + 1:>2}: {floor:.4f}  {text}")
keep("replacing only", encoder.encode([text])[0], text)

# %% [markdown]
# Here the loop's steps are used up. Near a top the estimates are worth less, and replacing alone cannot lengthen the string.
# `promptrec.token_search` adds insertions (ranked by the same gradient, in a copy of the string with one token doubled),
# deletions and swaps, accepts several changes at once, and when stuck drops some words and grows again. It works over
# any PyTorch encoder.
#
# ## Every method, the same budget
#
# What others did stands behind the same interface: *greedy* appends whichever unit of the whole vocabulary helps most
# (4th place), *beam* keeps the best few strings of a length (7th), *random* edits one string and keeps what helps (6th),
# *genetic* crosses two good ones. And *surrogate* needs no backward pass: it ranks edits by vectors learnt for each token,
# which {doc}`from-embedding-to-prompt` explains.
#
# ```{image} ../../images/beam-search.svg
# :alt: Three columns with what one step does to a short string. Greedy tries every word at the end and keeps the best; beam appends drawn words to several strings and keeps the best of a length; gradient search ranks all words at all places by one backward pass, encodes the best few exactly and keeps a rise.
# :width: 100%
# ```
#
# All start from the best constant, use the same vocabulary (the words of the searched prompts that are one token), and
# may have the same number of strings encoded.

# %%
budget = SearchSettings(
    evaluations=settings.evaluations, candidates=settings.candidates, vocabulary=tuple(words), seed=settings.seed
)
found = {method: search(encoder, objective, constant, replace(budget, method=method)) for method in METHODS}
for method, one in found.items():
    keep(method, encoder.encode([one.text])[0], one.text)
pd.DataFrame({m: {"evaluations": f.evaluations, "backward passes": f.gradients} for m, f in found.items()}).T


# %%
def curves(ceiling: float) -> Figure:
    """The best score so far of every search, against the strings it had encoded."""
    with matplotlib.rc_context(plot_style.STYLE):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.axhline(ceiling, color=plot_style.GREY, linestyle=":", label="best vector")
        looks = zip(found.items(), plot_style.PALETTE, plot_style.MARKERS, ("-", "--", "-.", ":", "-", "--"))
        for (method, one), colour, marker, line in looks:
            x = [*(step.evaluations for step in one.history), settings.evaluations]
            y = [*(step.value for step in one.history), one.value]
            style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4}
            axes.plot(x, y, drawstyle="steps-post", label=f"{method} ({one.value:.4f})", **style)
        axes.set(xlabel="strings encoded exactly", ylabel="mean SCS, searched prompts", ylim=(0, ceiling * 1.08))
        figure.legend(loc="outside right upper")
    ends = ", ".join(f"{method} {one.value:.4f}" for method, one in found.items())
    return plot_style.alt_text(
        figure, f"Best score so far against strings encoded. Ends: {ends}; best vector {ceiling:.4f}."
    )


curves(records["best vector"]["searched"])

# %% [markdown]
# Read the curves from the left: what matters is how high a line is after few encodings. Greedy and beam spend their
# budget at the end of the string, and a budget smaller than the vocabulary does not even let greedy try every word once:
# this is a comparison at equal cost, not at their best. (A method that asks for many strings at once learns of them
# all at the end, hence the late steps.) Backward passes are not in the budget; the table above counts them.
#
# On the judges, with intervals:

# %%
summary = pd.DataFrame.from_dict(records, orient="index").rename_axis("method").reset_index()
figure = plots.method_intervals(summary)
figure

# %% [markdown]
# And the strings themselves, which nobody would take for an instruction:

# %%
for method, one in found.items():
    print(f"{method:<9} {one.text}")

# %% [markdown]
# ## Overfitting
#
# How many prompts does a search need? The same search, on fewer and more of the searched half. Everything is measured
# on the same judges.

# %%
short, rows = replace(budget, evaluations=settings.short_search), []
for size in [*settings.sizes, len(train)]:
    part = Objective.mean(train[:size])
    one = search(encoder, part, constant, short)
    for name, at in (("string", encoder.encode([one.text])[0]), ("best vector", part.best_vector(settings.seed)[0])):
        rows.append((size, name, part.value(at[None])[0], ((held @ at) ** 3).mean()))
sizes = pd.DataFrame(rows, columns=["prompts", "answer", "searched", "held out"])
sizes.round(4)

# %%
with matplotlib.rc_context(plot_style.STYLE):
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, part), colour in zip(sizes.groupby("answer"), (plot_style.BLUE, plot_style.VERMILLION)):
        axes.plot(part["prompts"], part["searched"], "--o", color=colour, label=f"{name}, on the searched")
        axes.plot(part["prompts"], part["held out"], "-s", color=colour, label=f"{name}, on the held out")
    axes.set(xscale="log", xlabel="prompts searched with (log scale)", ylabel="mean SCS")
    axes.set_xticks([*settings.sizes, len(train)], [*settings.sizes, len(train)], minor=False)
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.legend(loc="upper right")
ends = sizes[sizes["answer"] == "string"].iloc[[0, -1]]
told = "; ".join(f"{n} prompts: {a:.3f} searched, {b:.3f} held out" for n, _, a, b in ends.itertuples(index=False))
plot_style.alt_text(figure, f"Scores of the searched string on searched and held-out prompts, which close in. {told}.")

# %% [markdown]
# The dashed and the full line of a colour are the same answer, judged by the prompts it was made for and by others.
# With ten prompts a string is found that fits these ten. The gap closes with more prompts, and what counts, the full
# line, is far higher with hundreds than with ten. A mean prompt reported without its held-out score is worth nothing; that it was measured on *many*
# prompts does not help if they are the ones it was searched with.

# %% [markdown]
# ## Readable or not
#
# At the *word* level a string is made of whole words: that was the last search above, with all prompts. At the *token*
# level any piece that the encoder knows may stand anywhere.

# %%
by_level = {"word": one, "token": search(encoder, objective, constant, replace(short, level="token", vocabulary=()))}
for level, one in by_level.items():
    shown = keep(f"gradient, {level}s, {settings.short_search}", encoder.encode([one.text])[0], one.text)
    print(f"{level}: {one.value:.4f} searched, {records[shown.index[-1]]['mean']:.4f} held out\n  {one.text}")

# %% [markdown]
# Neither is a sentence. Words are easier to debug, to edit by hand and to append to a model's answer; pieces give the
# search more to choose from, and a longer run uses that. Whether it pays at this budget is in the two lines above. Some
# pieces help for reasons that have nothing to do with meaning: that is the subject of {doc}`what-the-metric-rewards`.

# %% [markdown]
# ## Prompts that are not ours
#
# Our list is not the hidden test set. A string that is best for our mixture of poems, letters and corrections may be
# mediocre on theirs. The leaderboard leaks the difference: submit a few constants, and their scores say what the hidden
# prompts are like. The 3rd-placed team used 16 such **probes**, the 7th more than 70.
#
# `probe_weights` asks: which weights of *our* prompts, none negative, give every probe the score it had *there*? Of all
# such weights it takes those nearest to equal.
#
# ### An example with a known truth
#
# Take the held-out half as the hidden set, and make it lopsided: only some kinds of prompt, in other shares than
# ours. Then forget all but the scores of the probes on it.

# %%
shares = {"form": 0.6, "voice": 0.3, "style": 0.1}
kinds = pd.Series(taxonomy[~searched])
hidden = kinds.map(shares).fillna(0) / kinds.map(kinds.value_counts())  # a weight for every held-out prompt
hidden_set = Objective(held, hidden.to_numpy())
random = np.random.default_rng(settings.seed)
drawn = random.permutation(len(train))
probes, others = train[drawn[: settings.probes]], train[drawn[settings.probes :][:100]]
scores = hidden_set.value(probes).round(4)  # all that the leaderboard tells
print("probe scores:", scores)

# %%
weights, residual = probe_weights(train, probes, scores)
weighted = Objective(train, weights)
before = np.sqrt(np.mean((objective.value(probes) - scores) ** 2))
print(f"probes: RMS error {before:.5f} with equal weights, {residual:.5f} with these")
for name, ours in (("equal weights", objective), ("probe weights", weighted)):
    error = np.sqrt(np.mean((ours.value(others) - hidden_set.value(others)) ** 2))
    print(f"{len(others)} other constants: RMS error {error:.5f} with {name}")
print(f"prompts that carry the weight: {1 / (weights @ weights):.0f} of {len(weights)}")

# %% [markdown]
# That the probes themselves come out is no proof: there are more weights than probes. The other constants are the
# proof: they were not shown. And is it the right mixture?

# %%
share = pd.Series(weights).groupby(taxonomy[searched]).sum()
pd.DataFrame({"equal": pd.Series(taxonomy[searched]).value_counts(normalize=True), "by probes": share}).join(
    pd.Series(shares, name="hidden truth")
).fillna(0).round(2)

# %% [markdown]
# It is not: the shares have hardly moved. Sixteen numbers do not determine hundreds of weights, and of all weights that
# reproduce them those nearest to equal were taken. What a mean prompt needs is less than the mixture, though: that
# strings are scored as the hidden set scores them. So what matters is whether a string searched under these weights does better on the hidden set than one searched under equal weights.

# %%
by_weight = {"equal weights": by_level["word"], "probe weights": search(encoder, weighted, constant, short)}
for (name, one), ours in zip(by_weight.items(), (objective, weighted)):
    vector, string = hidden_set.value(np.stack([ours.best_vector(settings.seed)[0], encoder.encode([one.text])[0]]))
    print(f"{name}, on the hidden set: best vector {vector:.4f}, string {string:.4f}\n  {one.text}")

# %% [markdown]
# The best vectors show what the weights are worth, and from sixteen probes it is not much. The strings add the luck of
# one short search each, which may be larger than that in either direction: before weights are worth having, the search
# has to be long, or repeated with several seeds. With your own probes, as a table with the columns
# `rewrite_prompt` and `score`: `promptrec mean-prompt prompts.txt --out best.txt --probes probes.csv`.
#
# ### With the scorer of record
#
# Two constants whose wording and leaderboard score are both public: *"Improve that text."* (.58) and *"Improve the text
# to this."* (.60). With a sentence-t5 attached: what do our prompts say about them, and which weights reproduce them?

# %%
KNOWN = {"Improve that text.": 0.58, "Improve the text to this.": 0.60}
folder = Path(settings.sentence_t5 or ("" if profile.scorer == "minilm" else profile.scorer_model))
kind = "t5-tf" if (folder / "saved_model.pb").is_file() else "t5-hf"
if folder.name and folder.is_dir():
    t5, scores = get_scorer(kind, str(folder)), np.array(list(KNOWN.values()))
    ours, constants = t5.encode(options), t5.encode(list(KNOWN))
    weights, residual = probe_weights(ours, constants, scores)
    print(f"{t5.name}: equal weights give {Objective.mean(ours).value(constants).round(3)}, known {scores}")
    print(f"residual {residual:.4f}; {1 / (weights @ weights):.0f} of {len(ours)} prompts carry the weight")
else:
    print("skipped: no sentence-t5 is attached; set MeanPromptSettings.sentence_t5 to its folder")

# %% [markdown]
# A residual far from zero means that no mixture of our prompts behaves like the hidden set: the list lacks something.
#
# ## Keep

# %%
summary = pd.DataFrame.from_dict(records, orient="index").rename_axis("method").reset_index()
path = write_table(summary, Path(profile.out) / "mean-prompts.csv")
write_manifest(
    path, started=started, profile=profile.name, seed=settings.seed, rows=len(summary), settings=settings,
    scorer=scorer.name,
)  # fmt: skip
print(path.name, len(summary), "rows;", scorer.name)
summary[summary["text"] != ""].nlargest(3, "mean").round(4)

# %% [markdown]
# ## Summary
#
# * The best vector bounds every string; under the cube it is a mean of prompts weighted by squared cosine.
# * One backward pass ranks every replacement at every place; only exact encodings are believed.
# * A string fits the prompts it was searched with. The held-out score is the score.
# * Probes weigh our prompts towards somebody else's; judge the weights by constants that they were not fitted to.
#
# **Next.** A long search for real use, with progress and a manifest, is `promptrec mean-prompt`: on 6,000 prompts of other
# people, half of them searched with, 16,000 encodings in under five minutes on two cores reach .155 [.151, .159] on the
# other half (MiniLM, n = 2,950), 92% of the best vector's score (`benchmarks/mean_prompt.json`). With
# `--scorer t5-hf --scorer-model FOLDER` it searches under sentence-t5. A mean prompt is also what to put *behind* an
# unsure answer: on the leaderboard, joined answers of four models went from .64 to .66 with one. What else the metric
# pays for: {doc}`what-the-metric-rewards`.
