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
# # Part 1: Generate training data
#
# **Make triples (original text, rewrite prompt, rewritten text), clean them, and split them so that the score means something.**
#
# | | |
# |---|---|
# | accelerator | none (`local`: a rule-based stand-in for Gemma) · a TPU with 8 cores or 2xT4 for Gemma-7b-it |
# | time | under a minute on two CPU cores; for the TPU, the notebook this series descends from reports about six hours for 5,000 rows |
# | reads | original texts, rewrite prompts, optionally other people's triples |
# | writes | `training_data.csv` and its manifest |
# | prerequisites | Python and pandas; no machine learning |

# %% [markdown]
# ## The task, and why there is no data
#
# Somebody gave Gemma, an instruction-tuned language model, a text and a prompt: *"Rewrite this as a sea shanty."* We see the
# text before and after. What was the prompt? That is Kaggle's
# [LLM Prompt Recovery](https://www.kaggle.com/competitions/llm-prompt-recovery).
#
# The hosts published **one** training row. Everybody who took part therefore began by becoming the hosts: collect texts, invent
# prompts, let Gemma rewrite. This part does that, and most of its length goes into what decides the result later: which rows to keep, and
# which rows may be compared with which.
#
# ```{image} ../images/pipeline.svg
# :alt: The pipeline. Part 1 turns originals and prompts into training data, Part 2 turns training data into a LoRA adapter, Part 3 turns the adapter into predictions, scores and a submission.
# :width: 100%
# ```

# %% [markdown]
# ## Set-up
#
# A *profile* says where we are and what that allows. It is detected, or taken from `PROMPTREC_PROFILE`.

# %%
from promptrec.doctor import devices
from promptrec.profiles import activate, describe, get_profile, override
from promptrec.tables import versions

profile = activate(get_profile())
print("profile:", profile.name, "-", profile.where)
print("devices:", devices())
print("versions:", ", ".join(f"{name} {version}" for name, version in versions().items()))

# %%
import random
import sqlite3
import time
from pathlib import Path

import pandas as pd

from promptrec import data, plot_style, plots, splits, templates
from promptrec.cleaning import clean, strip_lead_in
from promptrec.grammar import load_grammar
from promptrec.prompt_bank import grammar_prompts, shipped_prompts
from promptrec.rewriting import get_rewriter, rewrite_table
from promptrec.scoring import get_scorer
from promptrec.tables import write_manifest, write_table

pd.set_option("display.max_colwidth", 90)
started = time.time()

# %% [markdown]
# ## Configuration
#
# Everything that can be set stands here. `override` checks the types and refuses names it does not know, so a misspelt setting
# fails now and not after six hours.

# %%
settings = override(
    data.DataSettings() if profile.name == "local" else data.GEMMA,
    seed=0,
)
out = Path(profile.out)
print(describe(settings))

# %% [markdown]
# ## Original texts
#
# The hidden test set holds texts of many kinds, so the training set should too. Corpora come as CSV, as SQLite databases, as JSON lines, as Parquet.
# One function reads them all. On Kaggle the sources are the attached corpora; offline they are the project's own paragraphs. To see that the format
# does not matter, we spread those over four files first.

# %%
shipped = data.shipped_originals()
quarters = [shipped.iloc[start::4] for start in range(4)]
folder = out / "originals"
for quarter, name in zip(quarters, ["a.csv", "b.jsonl", "c.parquet"]):
    write_table(quarter, folder / name)
with sqlite3.connect(folder / "d.sqlite") as connection:
    quarters[3].to_sql("paragraphs", connection, if_exists="replace", index=False)

# %%
local_sources = [data.Source(str(folder / name), "text") for name in ("a.csv", "b.jsonl", "c.parquet")]
local_sources.append(data.Source(str(folder / "d.sqlite"), "text", table="paragraphs"))
sources = data.profile_sources(profile) if profile.name.startswith("kaggle") else local_sources
originals = data.load_originals(sources, seed=settings.seed)
print(len(originals), "originals of", originals["kind"].nunique(), "kinds")
originals.groupby("source")["text"].agg(["size", "first"])

# %% [markdown]
# ### Cut and filter
#
# Gemma is slow on long texts and the test texts are short, so originals are cut, back to the last full sentence where that keeps at
# least half of the words. What is too short, not ASCII or full of wiki headings is dropped.

# %%
import itertools
import re

SENTENCE_END = re.compile(r"[.!?]+[\"'”’)]*(?=\s|\Z)")


def slice_words(text: str, words: int = 256) -> str:  # same as promptrec.data.slice_words
    """The first `words` words, cut back to the last full sentence when that keeps at least half of them."""
    ends = [word.end() for word in itertools.islice(re.finditer(r"\S+", text), words + 1)]
    if len(ends) <= words:
        return text
    cut = text[: ends[words - 1]]
    end = max((sentence.end() for sentence in SENTENCE_END.finditer(cut)), default=0)
    return cut[:end] if end >= len(cut) // 2 else cut


print(slice_words("One two three. Four five six seven. Eight nine.", words=5))

# %% [markdown]
# The sentence boundary wins over the word count: the text ends after "three." instead of in the middle of the next sentence.
#
# One thing must happen **before** the cut: each original is given to a side (train, validation or test) by a hash of its full text. Two slices of one
# text can then never end up on two sides, and the side is the same on every machine.

# %%
decided = dict(zip(shipped["text"], shipped["split"]))
originals["split"] = [decided.get(text) or splits.hash_split(text) for text in originals["text"]]
originals["text"] = [slice_words(text, settings.slice_words) for text in originals["text"]]
originals = originals[[data.keep_original(text, settings.shortest_original) for text in originals["text"]]]
print(originals["split"].value_counts().to_string())

# %% [markdown]
# ## Rewrite prompts
#
# Two sources. *Hand-written* prompts are free wordings, made by no rule (who wrote them: {doc}`../docs/data-card`). A *Mad-Libs grammar* makes thousands more from wordings with slots; it knows which style and
# which slot values it put in, which helps when we ask later what a model gets right. It knows 70 styles; the offline run draws from 18 of them, as many as a few minutes of training on two cores can teach.

# %%
grammar = grammar_prompts(
    settings.prompts, seed=settings.seed, styles=settings.styles, mixture_share=settings.mixture_share
)
written = shipped_prompts()
print(len(grammar), "grammar prompts over", grammar["style"].nunique(), "styles;", len(written), "hand-written prompts")
grammar.sample(6, random_state=1)[["rewrite_prompt", "style", "slots"]]

# %% [markdown]
# A prompt should suit its text: *"list the ingredients as bullet points"* on a poem teaches nothing, and the authors of one study name such mismatches as a
# reason for poor training data. Each prompt therefore carries the kinds of text it suits. The offline stand-in can carry out grammar prompts only; Gemma takes both. The styles below are choosy, the others suit any text.

# %%
prompts = grammar
if profile.rewriter != "rules":
    prompts = pd.concat([grammar, written.assign(kinds="any", style="written")], ignore_index=True)
picky = {name: style.kinds for name, style in load_grammar().styles.items() if "any" not in style.kinds}
pd.DataFrame(
    {
        "suits kinds": {name: len(kinds) for name, kinds in picky.items()},
        "such as": {n: k[2:5] for n, k in picky.items()},
    }
)

# %% [markdown]
# ## Split first: by prompt cluster
#
# Here is where many published scores went wrong. If *"Rewrite it as a sea shanty"* is in the training set and *"Rewrite this as a sea shanty!"* in the test set, a model can
# score without having understood anything: it looks its answers up. A random split over **rows** does that to nearly every prompt.
#
# ```{image} ../images/cluster-split.svg
# :alt: Prompts as dots in embedding space. A row-level split colours neighbours differently and so leaks; a cluster split gives each group of neighbours to one side.
# :width: 100%
# ```
#
# So prompts are grouped first. Two prompts whose embeddings have a cosine of at least 0.9 belong together, and so does everything linked through them (connected components). Then
# whole clusters go to one side.

# %%
scorer = get_scorer("minilm")
vectors = scorer.encode(prompts["rewrite_prompt"].tolist())
near = vectors[:500] @ vectors[:500].T
pairs = [(i, j) for i in range(len(near)) for j in range(i) if 0.88 < near[i, j] < 0.93]
for i, j in random.Random(3).sample(pairs, min(4, len(pairs))):
    print(f"{near[i, j]:.2f}  {prompts['rewrite_prompt'][i]!r}  ~  {prompts['rewrite_prompt'][j]!r}")

# %% [markdown]
# Around 0.9 the two requests are the same in other words. That is the border we want: a model may know the *style* from training, but not the *wording*.
#
# The project's hand-written triples come with a fixed split. They are clustered together with the new prompts, and a cluster that holds one of them follows it.
# Offline only some of those to learn from take part: the tiny model has a few minutes, and free prompts teach it little.

# %%
triples = data.shipped_triples()
to_learn = triples[triples["split"] != "test"]
if settings.written:
    to_learn = to_learn.sample(min(settings.written, len(to_learn)), random_state=settings.seed)
triples = pd.concat([to_learn, triples[triples["split"] == "test"]], ignore_index=True)
known = pd.concat([prompts[["rewrite_prompt"]], triples[["rewrite_prompt"]]]).drop_duplicates(ignore_index=True)
clusters = splits.cluster_prompts(scorer.encode(known["rewrite_prompt"].tolist()))
fixed = dict(zip(triples["rewrite_prompt"], triples["split"]))
known["prompt_cluster"] = clusters
known["split"] = splits.split_clusters(known["rewrite_prompt"], clusters, fixed=fixed)
known.groupby("split").agg(prompts=("rewrite_prompt", "size"), clusters=("prompt_cluster", "nunique"))

# %%
figure = plots.cluster_sizes(clusters)
plot_style.alt_text(
    figure, "Prompts per cluster, largest first: a few clusters hold many wordings, most hold one or two."
)

# %%
sample = known.sample(min(1500, len(known)), random_state=0)
figure = plots.prompts_in_space(scorer.encode(sample["rewrite_prompt"].tolist()), sample["split"])
plot_style.alt_text(
    figure, "Prompt embeddings on two principal components, coloured by split: all sides cover the same regions."
)

# %% [markdown]
# The sides overlap in space, as they should: the split keeps near-copies apart, it does not move a whole topic to the test set.
#
# ## Pair texts with prompts
#
# A pair stays inside one side, so nothing that is rewritten at great cost has to be thrown away later. Every prompt is used once before any is used twice: competitors
# report that distinct prompts help more than further rows of the same ones. (At our size {doc}`../docs/comparison` does not confirm that.)

# %%
columns = ["rewrite_prompt", "prompt_cluster", "split"]
prompts = prompts.merge(known[columns], on="rewrite_prompt")
todo = data.pair(originals, prompts, settings.rows, seed=settings.seed)
print(len(todo), "pairs with", todo["rewrite_prompt"].nunique(), "distinct prompts")
todo.sample(3, random_state=2)[["original_text", "rewrite_prompt", "kind", "split"]]

# %% [markdown]
# ## Rewrite
#
# ### What Gemma is asked
#
# A chat model sees turns, marked by special tokens. A missing beginning-of-sequence token or one newline too many makes Gemma markedly worse, which is why the package has one function for
# it and nobody types it twice.

# %%
print(templates.rewrite_request("The ferry leaves at nine.", "Make it rhyme"))

# %% [markdown]
# How the hosts joined prompt and text is unknown. Of three plausible ways one is picked per row, so that a model trained on the data does not depend on a guess.
#
# ### The two Gemma paths
#
# **On a TPU** (v5e-8 or v3-8) Gemma runs in Keras on JAX. Eight cores hold 16 GB each; 8.5 billion parameters in bfloat16 take 17 GB, more than one core has. So the weights are
# *sharded*: each core keeps an eighth of every matrix, computes with its part, and the partial results are added up.
#
# ```{image} ../images/sharding.svg
# :alt: One transformer block over a mesh of eight cores. Query, key, value and gate matrices are split by columns, output and down matrices by rows, and an all-reduce adds the partial results.
# :width: 100%
# ```
#
# ```python
# # what promptrec.rewriters.keras_gemma does
# devices = keras.distribution.list_devices()
# mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
# layout = keras.distribution.LayoutMap(mesh)
# layout[".*query/kernel"] = ("model", None, None)   # and so on for every matrix: see Part 2 on a TPU
# keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"))
# model = keras_hub.models.GemmaCausalLM.from_preset(profile.rewriter_model)
# generate(model, tokenizer, requests, KerasGeneration(max_new_tokens=384))   # in batches of one length bucket
# ```
#
# **On two T4** Gemma runs in torch, its weights quantised to 4 bits (Part 2 explains how), half of the layers on each card.
#
# ```python
# # what promptrec.rewriters.hf does
# model = AutoModelForCausalLM.from_pretrained(path, quantization_config=nf4_config(), device_map="balanced")
# model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=384)   # left-padded, sorted by length
# ```
#
# **Offline** there is no Gemma. A rule-based *stand-in* takes its place: it carries out the grammar's styles by substitution, reordering and layout. Its texts are consistent and recognisable, which is what a
# small model needs to learn the task from; they are not what Gemma would write, and nothing measured on them says how well one would do on Kaggle.

# %%
rewriter = get_rewriter(profile, seed=settings.seed)
example = todo.iloc[0]
print("prompt  :", example["rewrite_prompt"], "\noriginal:", example["original_text"])
print("rewrite :", rewriter.rewrite([example["original_text"]], [example["rewrite_prompt"]])[0])

# %% [markdown]
# ### Nothing done is lost
#
# Kaggle ends a session after twelve hours on a GPU and nine on a TPU, and machines die. Every finished batch is appended to a log and forced to disk; a restart reads the log and goes on with what is missing. To see it, stop after the first batch and call
# again.

# %%
log = out / "rewrites.jsonl"
first = rewrite_table(todo, rewriter, log, settings.batch_size, stop_after=0.01)
print(len(first), "rows when interrupted")
rewritten = rewrite_table(todo, rewriter, log, settings.batch_size, stop_after=settings.time_budget or None)
print(len(rewritten), "rows after going on; lines in the log:", log.read_text().count("\n"))

# %% [markdown]
# :::{tip}
# A notebook that saves once, at the end, has lost people six hours of TPU time. Append and resume costs two lines; see `promptrec.rewriting`.
# :::
#
# ## Clean
#
# Chat models chat. *"Sure, here is the text as a pirate would say it:"* gives the prompt away, and it will not be in the test set: the hosts removed it. So do we.

# %%
print(strip_lead_in("Sure, here is the text as a shanty:\n\nOh, the ferry she sails at nine, boys"))

# %% [markdown]
# Then rows go that would teach something wrong: refusals, rewrites that changed nothing, blanks, extremes of length, near-duplicates.

# %%
cleaned, report = clean(rewritten)
print(f"{len(rewritten)} rows in, {len(cleaned)} out")
report.to_frame()

# %%
figure = plots.length_histogram(cleaned, ["original_text", "rewritten_text"])
plot_style.alt_text(
    figure, "Words per text before and after rewriting; rewrites are somewhat longer and more spread out."
)

# %% [markdown]
# ## Merge
#
# Other people's sets have other column names and their own quality. They are renamed, checked row by row, cleaned by the same rules, and keep their provenance in `source`. Here the project's hand-written
# triples join; a CSV, JSONL or Parquet of your own is one more line: `data.load_triples("my.csv")`.

# %%
real, real_report = clean(triples)
print("lead-ins stripped from the hand-written triples:", real_report["lead-in stripped"])
merged = data.merge_triples([cleaned, real])
merged = merged.drop(columns=["split", "prompt_cluster"]).merge(known[columns], on="rewrite_prompt")
merged["source"].value_counts().to_frame("rows")

# %% [markdown]
# A merged row can sit between the sides (its prompt in the test set, its original in training). Such rows are left out and counted.

# %%
side = decided | dict(zip(originals["text"], originals["split"]))
kept = splits.drop_mixed(merged, merged["original_text"].map(side), merged["split"])
print(len(merged) - len(kept), "mixed rows left out of", len(merged))
training = splits.check_split(kept)[list(data.TRAINING_COLUMNS)]

# %% [markdown]
# `check_split` raises an error if any prompt cluster, prompt or original lies on two sides. It is not a courtesy: a test of this project asserts it too.
#
# ## Save

# %%
path = write_table(training, out / "training_data.csv")
write_manifest(
    path,
    started=started,
    profile=profile.name,
    seed=settings.seed,
    rows=len(training),
    settings=settings,
    rewriter=rewriter.name,
)
print("saved", path.name, "with", len(training), "rows")
training.pivot_table(index="source", columns="split", values="id", aggfunc="count")

# %%
for row in training[training["source"] == rewriter.name].sample(3, random_state=4).itertuples():
    print(
        f"PROMPT    {row.rewrite_prompt}\nORIGINAL  {row.original_text[:160]}\nREWRITTEN {row.rewritten_text[:160]}\n"
    )

# %% [markdown]
# ## Summary
#
# * Triples were made from originals and prompts, in appended batches that survive a kill.
# * Prompts were clustered and split **before** the expensive step; no cluster and no original is on two sides.
# * Lead-ins, refusals, unchanged and extreme rows are gone; provenance is kept.
#
# **How this differs from the documents it descends from, and why.** The tutorial behind this series used one prompt bank for training and test and split by row; its score of .78 therefore cannot be compared with a leaderboard. It rewrote for about six hours and saved at
# the end. The paper merged four sets without asking which prompts they share. Here the split comes first, work is saved as it is done, and each row says where it comes from.
#
# **Next:** {doc}`2-fine-tune` teaches a model to read a prompt off such pairs.
