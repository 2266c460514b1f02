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
# # Part 3: Evaluate and submit
#
# **Ask every method for the prompt behind texts it has never seen, score the answers, say how sure we are, and write
# the file Kaggle takes.**
#
# | | |
# |---|---|
# | accelerator | none (`local`) · 2xT4 or a TPU for Gemma-7b-it |
# | time | 4 to 8 minutes on two CPU cores; the most where nothing has been embedded or fitted before |
# | reads | `training_data.csv` ({doc}`1-generate-data`), `adapter/` ({doc}`2-fine-tune`), the base model |
# | writes | `predictions.csv`, `scores.csv`, `comparison.csv`, `report.json`, `submission.csv` |
# | prerequisites | Parts 1 and 2 have run; no knowledge of fine-tuning is needed to read this part |

# %% [markdown]
# ## Why the task is hard
#
# Somebody turned *"The ferry leaves at nine"* into *"Oh, the ferry she sails at nine, boys, at nine!"* The two texts
# show **what changed**. They do not show **what was asked**: *"Make it a sea shanty"*, *"Turn the announcement into a
# song"* and *"Say it like an old sailor"* could all have led there. The score compares our answer with the one
# sentence that was really used, so a method has to see the change, name it, and hit the wording, for prompts that it
# never met in training.
#
# A single mean score hides how much of that worked. This part therefore starts with answers that do not look at the
# texts at all, and asks of everything else: how much better, on the same rows, and how sure are we?

# %% [markdown]
# ## Set-up

# %%
from promptrec.doctor import devices
from promptrec.profiles import activate, describe, find_result, get_profile, model_name, override
from promptrec.tables import versions

profile = activate(get_profile())
print("profile:", profile.name, "-", profile.where)
print("devices:", devices())
print("versions:", ", ".join(f"{name} {version}" for name, version in versions().items()))

# %%
import dataclasses
import hashlib
import textwrap
import time
from pathlib import Path

import pandas as pd

from promptrec import data, plots, templates
from promptrec.comparison import compare
from promptrec.decoding import DecodingSettings
from promptrec.embedding import EmbeddingRecoverer, RetrievalRecoverer
from promptrec.engines import load_engine
from promptrec.inference import Constant, LanguageModelRecoverer, best_constant, normalise, pick_shots
from promptrec.predictor import PredictorSettings
from promptrec.scoring import profile_scorer
from promptrec.submission import fill_blanks, read_test, write_submission
from promptrec.tables import read_table, write_json, write_manifest, write_table

pd.set_option("display.max_colwidth", 100)
started = time.time()

# %% [markdown]
# ## Configuration
#
# * **rows**: every method answers the same fixed sample of each test set. More rows, narrower intervals, longer run.
# * **shots**: solved examples in the few-shot request. Each costs the tokens of two texts, on every row.
# * **retrieval_rows**: training rows that the method without a language model is fitted on.
# * **embedding_rows**, **embedding_steps**: what the method after that is fitted on, and how long each of its three heads
#   is trained; `promptrec recover` trains five, longer.
# * **time_budget**: Kaggle ends a submission after nine hours. When a method's time is over, its remaining rows get a
#   constant.


# %%
@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """What Part 3 evaluates, and what it may cost."""

    rows: int = 200  # most rows of each test set; 0: all
    shots: int = 3
    longest_shot: int = 40  # words of each text of a shot
    longest_text: int = 300  # words of each text that a model gets to see
    retrieval_rows: int = 1000
    embedding_rows: int = 5000  # hand-written ones, at most; with as many others as retrieval had
    embedding_steps: int = 150  # of training, for each of three heads
    new_tokens: int = 32
    batch_size: int = 64
    time_budget: float = 0.0  # seconds a method; 0: none
    seed: int = 0


GEMMA = EvaluationSettings(rows=400, longest_shot=60, retrieval_rows=5000, batch_size=16, time_budget=1.5 * 3600)

# %%
settings = override(EvaluationSettings() if profile.name == "local" else GEMMA, seed=0)
out = Path(profile.out)
to_submit = read_test(profile)  # the competition's rows: what is wrong with them should show before the hours of work
print(describe(settings))

# %% [markdown]
# ## The test rows
#
# On Kaggle each part may be a notebook of its own; then the results of the earlier parts are attached as inputs. So
# `find_result` looks in the output folder first and among the inputs second.

# %%
table = read_table(find_result(profile, "training_data.csv"), required=data.TRAINING_COLUMNS)
table["test_set"] = table["source"].replace({"promptrec": "hand-written"})
train = table[table["split"] == "train"]
held_out = table[table["split"] == "test"]
held_out.groupby("test_set").agg(rows=("id", "size"), clusters=("prompt_cluster", "nunique"))

# %% [markdown]
# There are two test sets, and they answer different questions.
#
# * **The rewriter's rows.** Offline their rewrites come from the rule-based *stand-in* of Part 1. They tell whether
#   the machinery works and whether a model can learn to read a change off two texts. They tell nothing about Gemma's
#   texts. On Kaggle the rewriter is Gemma, and this is the set that counts.
# * **The hand-written rows.** Free prompts and free rewrites, much nearer to the real task, and few: some
#   five hundred, of which two hundred are evaluated. Read their interval before their mean.
#
# Neither set was touched in Part 2: its checkpoint was chosen on *validation* rows. That is why validation rows, of
# either kind, are no use here: a checkpoint picked because it does well on them does well on them.


# %%
def sample(rows: pd.DataFrame) -> pd.DataFrame:
    """The fixed sample of one test set, the same for every method and every run."""
    return rows.sample(min(len(rows), settings.rows or len(rows)), random_state=settings.seed)


test = pd.concat([sample(rows) for _, rows in held_out.groupby("test_set")], ignore_index=True)
test_sets = list(test["test_set"].unique())
print("evaluated:", ", ".join(f"{name} n = {(test['test_set'] == name).sum()}" for name in test_sets))
print("prompts shared with training:", test["rewrite_prompt"].isin(train["rewrite_prompt"]).sum())

# %% [markdown]
# No test prompt occurs in training, and by Part 1's cluster rule no near-copy of one does either.
#
# ## The metric
#
# Both sentences, the predicted and the true prompt, are turned into vectors by a sentence encoder. The cosine of the
# angle between them says how alike they are in meaning; its cube is the score of the row. The competition calls it
# *sharpened cosine similarity*, SCS.


# %%
import numpy as np


def scs(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:  # same as promptrec.scoring.scs
    """Sharpened cosine similarity of two [n, d] arrays, row by row: cos(a, b)**3, shape [n].

    Source: Kaggle, LLM Prompt Recovery, evaluation page.
    """
    cosine = (predicted * true).sum(-1) / (np.linalg.norm(predicted, axis=-1) * np.linalg.norm(true, axis=-1))
    return cosine**3


# %%
scorer = profile_scorer(profile)
truth = "Rewrite this text as a sea shanty"
guesses = {
    "the exact prompt": truth,
    "same, other words": "Turn the passage into a sea shanty",
    "the wrong form": "Rewrite this text as a poem",
    "the right idea": "Make it a song that sailors would sing",
    "a vague answer": "Improve the text to this.",
    "off the topic": "What time does the ferry leave?",
}
cosines = {name: float(scorer.encode([guess])[0] @ scorer.encode([truth])[0]) for name, guess in guesses.items()}
print("scorer:", scorer.name)
pd.DataFrame({"guess": guesses, "cosine": cosines, "SCS": {name: c**3 for name, c in cosines.items()}}).round(2)

# %%
figure = plots.cos_cubed(cosines)
figure

# %% [markdown]
# The cube is cruel to the middle. A guess that says the same thing in other words loses about half, and the right
# idea in free words can score below the wrong form in the right words: the encoder compares sentences, it does not
# know what a sailor sings.
#
# That also bounds what anybody can reach. Here are four fair readings of the ferry example; each row of the table
# treats one of them as the truth.

# %%
readings = [
    "Make it a sea shanty",
    "Turn the announcement into a song",
    "Say it like an old sailor",
    "Rewrite it in rhyme, with a refrain",
]
vectors = scorer.encode(readings)
pd.DataFrame([scs(vectors, one) for one in vectors], index=readings, columns=["1", "2", "3", "4"]).round(2)

# %% [markdown]
# Off the diagonal the scores are close to zero under this scorer, although a person would accept every one of these
# answers.
#
# ### Which encoder
#
# The **scorer of record** is sentence-t5-base in its TensorFlow version, as the competition ran it. The Kaggle
# profiles use it. Offline its place is taken by **MiniLM**, a small encoder that comes with the Python environment.
# It is a *proxy*:
#
# * The two agree on the order: on 1,427 real pairs of prediction and truth the correlation is .85.
# * They disagree on the scale: the sentence-t5 cosine is about .75 + .23 times MiniLM's. Two unrelated sentences have
#   a MiniLM cosine near 0 and a sentence-t5 cosine near .75, which is an SCS of .42 for nothing.
# * So the same answers of Mistral-7B score .618 under sentence-t5 and .117 under MiniLM.
#
# :::{warning}
# Never compare a MiniLM number with a leaderboard number. Every table below names its scorer.
# :::

# %% [markdown]
# ## Baselines first
#
# A small helper lets a method answer all test rows, keeps the answers and the time, and prints the mean for each test
# set.

# %%
answers, seconds = {}, {}


def keep(name: str, prompts: list[str], began: float) -> None:
    """Keep a method's answers to all test rows and print its mean SCS for each test set."""
    answers[name], seconds[name] = prompts, round(time.time() - began, 1)
    rows = pd.Series(scorer.scs(prompts, test["rewrite_prompt"].tolist())).groupby(test["test_set"])
    means = ", ".join(f"{test_set} {values.mean():.3f} (n = {len(values)})" for test_set, values in rows)
    print(f"{name}: {means}; {scorer.name}, {seconds[name]} s")


# %% [markdown]
# ### One sentence for everything
#
# The first baseline reads nothing. This sentence scored .60 on the leaderboard, more than many language models did.

# %%
constant = Constant()
print(constant.prompt)
keep("constant", constant.recover(test), time.time())

# %% [markdown]
# ### The best constant
#
# Which single sentence is nearest to all prompts at once, in the sense of the score? Take the training prompts, let
# each be the answer to all the others, and keep the one with the highest mean. With unit vectors in a matrix that is
# one product.

# %%
prompts = train.loc[train["test_set"] == test_sets[-1], "rewrite_prompt"].tolist()
vectors = scorer.encode(prompts)  # [n, d]
means = ((vectors @ vectors.T) ** 3).mean(1)  # [n]: each prompt as the answer to all
order = means.argsort()
for place in (order[-1], order[len(order) // 2], order[0]):
    print(f"{means[place]:.3f}  {prompts[place]}")

# %% [markdown]
# The best, the median and the worst training prompt of the rewriter's rows, each as a constant. The best one need not
# be sensible: it is made of words that many prompts share. The worst says it in words that no other prompt uses.
#
# A baseline should be as strong as it honestly can be, so each test set gets the best constant of the training
# prompts of its own kind.

# %%
began = time.time()
constants = {name: best_constant(rows["rewrite_prompt"].tolist(), scorer) for name, rows in train.groupby("test_set")}
keep("best constant", test["test_set"].map(constants).fillna(constant.prompt).tolist(), began)
constants

# %% [markdown]
# This is the number to beat: what scores less is not worth submitting, whatever it has read in the two texts.
# Sentences *searched* word by word for this purpose ("mean prompts") go further and scored .69 on the leaderboard.
#
# ### Retrieval: no language model at all
#
# One step up: look at the texts, but do not write. A linear regression predicts the prompt's *embedding* from the
# embeddings of the two texts, and the answer is the training prompt nearest to that prediction.

# %%
began = time.time()
fitted_on = train.sample(min(len(train), settings.retrieval_rows), random_state=settings.seed)
retrieval = RetrievalRecoverer(scorer, bank=train["rewrite_prompt"]).fit(fitted_on)
keep("retrieval", retrieval.recover(test), began)

# %% [markdown]
# Retrieval can only ever return a prompt of its bank, and the split made sure that the true one is not in it. What it
# gains over the constant it gains by recognising the *kind* of change. One advantage over the models that follow
# should be kept in mind: it is fitted to the very embedding that scores it, they are trained to write words.
#
# ### Predict the embedding, then join prompts that land there
#
# The nearest prompt is a poor way to say what was predicted: the predicted vector itself scores far higher than the
# prompt next to it. So the second method without a language model does both halves better. A small network weighs the
# prompts of the bank; it is trained on the cubed cosine, with every prompt near the true one hidden from it, so that it
# learns to place prompts that no bank holds. Then up to five bank prompts are joined, one at a time, as long as the whole
# text comes nearer to the predicted vector; and where the scorer's encoder can be looked into, words are put in, taken out
# and replaced to the same end. Such an answer says several things at once, as someone would who is not sure; the scorer,
# which rewards being near, does not mind. {doc}`beyond/from-embedding-to-prompt` takes it apart.

# %%
began = time.time()
is_written = train["test_set"] == "hand-written"
written = pd.concat(
    [train[is_written].head(settings.embedding_rows), fitted_on[fitted_on["test_set"] != "hand-written"]]
)
predicted = EmbeddingRecoverer(
    scorer,
    bank=train["rewrite_prompt"],
    settings=PredictorSettings(folds=2, most_steps=settings.embedding_steps, seed=settings.seed),
    decoding=override(DecodingSettings(), seed=settings.seed),
).fit(written)
believed = predicted.posterior(test)
keep("embedding", predicted.decode(believed), began)
reached = scs(believed.vectors, scorer.encode(test["rewrite_prompt"].tolist()))
reached = pd.Series(reached).groupby(test["test_set"].to_numpy()).mean().round(3)
print("mean SCS of the predicted vectors themselves, which no string can be sure to reach:", reached.to_dict())

# %% [markdown]
# ## Language models
#
# Now the models that write. The base model and the adapter of Part 2 are loaded **once**: an adapter is a small
# addition to the weights that can be switched off, and with it off the same object is the untouched base. On a TPU
# it runs in Keras, elsewhere in torch; `engine` is called the same in both.

# %%
adapter = find_result(profile, "adapter")
engine = load_engine(profile, adapter, settings.new_tokens, settings.batch_size, settings.seed)
total, ours = (sum(size for name, size in engine.sizes.items() if mark in name) for mark in ("", "lora_"))
print(f"{model_name(profile.base_model)}: the adapter is {ours:,} of {total:,} stored weights")

# %% [markdown]
# (Two weights of four bits lie in one stored number.) What the model reads is the same text as in Part 2, from the same function. A second copy of a template is how a
# newline gets lost between training and test.

# %%
row = test.iloc[-1]
print(templates.recovery_request(row["original_text"][:120], row["rewritten_text"][:120], profile.chat))

# %% [markdown]
# ### Batches, sorted by length
#
# A GPU, or a CPU with many lanes, answers 64 rows in little more time than one, if they have the same length. They do
# not, so short rows are filled up with padding tokens that cost the same as real ones. Sorting the rows by length
# first puts equals together.


# %%
def padded(lengths: list[int], size: int) -> int:
    """Tokens to compute when rows go through in batches of `size`, each as wide as its longest row."""
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return sum(len(batch) * max(batch) for batch in batches)


pairs = test[["original_text", "rewritten_text"]].sample(frac=1, random_state=0).to_numpy()
lengths = [engine.length(templates.recovery_request(*pair, profile.chat)) for pair in pairs]
for name, tokens in {"one row at a time": sum(lengths), "as they come": padded(lengths, settings.batch_size)}.items():
    print(f"{name:18} {tokens:9,} tokens")
print(f"{'sorted':18} {padded(sorted(lengths), settings.batch_size):9,} tokens")

# %% [markdown]
# Unsorted, more than half of the work is padding; sorted, about an eighth is. `promptrec.language_model.generate`
# sorts, answers, and puts the answers back in the order of the rows. One row at a time needs no padding but as many
# calls as rows; the tutorial this series descends from took 74 minutes for 600 rows that way.
#
# ### A log, so that nothing is asked twice
#
# As in Part 1, each finished batch is appended to a file. The file's name carries a fingerprint of everything that
# decides the answers (rows, adapter, base model, settings, shots): change any of them and old answers are not found
# again by mistake.

# %%
adapter_digest = hashlib.sha256(engine.weights.read_bytes()).hexdigest()


def language_model(name: str, rows: pd.DataFrame, **options: object) -> LanguageModelRecoverer:
    """The loaded model as a recoverer for `rows`, with a log that belongs to exactly this question."""
    texts = rows[["id", "original_text", "rewritten_text"]].to_csv()
    mark = data.text_id(texts, adapter_digest, profile.base_model, describe(settings), str(options))
    log = out / "answers" / f"{name}-{mark}.jsonl"
    common = {"chat": profile.chat, "longest_text": settings.longest_text, "log": log}
    return engine.recoverer(name, **{**common, "stop_after": settings.time_budget or None, **options})


# %% [markdown]
# To see it work, stop zero-shot after its first batch and call again.

# %%
began = time.time()
zero_shot = language_model("zero-shot", test)
stopped = dataclasses.replace(zero_shot, stop_after=0.01).recover(test)
print(len(stopped), "answers returned; in the log:", zero_shot.log.read_text().count("\n"))
zero_shot_answers = zero_shot.recover(test)
print("in the log after going on:", zero_shot.log.read_text().count("\n"))

# %% [markdown]
# Even the interrupted call returned one answer for every row: what it had no time for got the fallback sentence. A
# late run then still ends in a valid file.
#
# ### From raw text to one clean line
#
# Chat models wrap their answer: a label, bold type, quotation marks, a friendly sentence after it. `normalise` takes
# that off.

# %%
for raw in (
    '**Prompt:** "Rewrite this as a sea shanty."\n\nLet me know if you would like another try!',
    "The instruction was: Turn it into a haiku<end_of_turn>",
    "  \n",
):
    print(repr(normalise(raw)))

# %% [markdown]
# The last line shows the rule that matters most. A model may answer nothing; on Kaggle **one blank row makes the
# whole submission an error**. So a blank becomes the constant from above, and the row still scores something.
#
# ### Zero-shot
#
# The base model, asked without an example and without the adapter.

# %%
keep("zero-shot", zero_shot_answers, began)
pd.DataFrame({"true prompt": test["rewrite_prompt"], "zero-shot": zero_shot_answers}).sample(3, random_state=1)

# %% [markdown]
# Offline the base is a Gemma of a few million parameters. It was never shown this task and answers with more text,
# not with a prompt. Gemma-7b-it does better: language models of about that size reached .51 to .61 zero-shot on the
# leaderboard, around the level of a constant.
#
# ### Few-shot
#
# Show some solved examples first. They come from training, are short (their tokens are paid for on every row), and
# belong to different prompt clusters.

# %%
began = time.time()
shots = pick_shots(train, settings.shots, settings.seed, settings.longest_shot)
few_shot = language_model("few-shot", test, shots=shots)
keep("few-shot", few_shot.recover(test), began)
pd.DataFrame({"true prompt": test["rewrite_prompt"], "few-shot": answers["few-shot"]}).sample(3, random_state=1)

# %% [markdown]
# With the examples the request is longer than any row the tiny base was trained on, and its text falls apart:
# examples are no substitute for a model that understands the question. For 7B models they were worth a few
# hundredths, up to .61 on the leaderboard.
#
# ### Fine-tuned
#
# The same weights, the same request, the adapter switched on.

# %%
began = time.time()
fine_tuned = language_model("fine-tuned", test, adapted=True)
keep("fine-tuned", fine_tuned.recover(test), began)
pd.DataFrame({"true prompt": test["rewrite_prompt"], "fine-tuned": answers["fine-tuned"]}).sample(3, random_state=1)

# %% [markdown]
# What changed is the *kind* of answer: it is now a rewrite prompt. Whether it is the right one is the question of the
# rest of this part.

# %% [markdown]
# ## All answers, all scores
#
# One row for each test row and method.

# %%
parts = [pd.DataFrame({"id": test["id"], "rewrite_prompt": given, "method": name}) for name, given in answers.items()]
predictions = pd.concat(parts, ignore_index=True)
truth = test[["id", "test_set", "prompt_cluster", "rewrite_prompt"]].rename(columns={"rewrite_prompt": "true_prompt"})
scored = predictions.merge(truth, on="id")
scored["scs"] = scorer.scs(scored["rewrite_prompt"].tolist(), scored["true_prompt"].tolist())
scores = scored[["id", "method", "test_set", "prompt_cluster", "scs"]]
print(f"{len(answers)} methods x {len(test)} rows = {len(scores)} scores")

# %%
for frame, name in ((predictions, "predictions.csv"), (scores, "scores.csv")):
    path = write_table(frame, out / name)
    write_manifest(
        path, started=started, profile=profile.name, seed=settings.seed, rows=len(frame),
        settings=settings, scorer=scorer.name, adapter=adapter_digest[:12],
    )  # fmt: skip

# %% [markdown]
# ## How sure are we?
#
# Another sample of test rows would have given another mean. How different? The *bootstrap* answers by pretending:
# draw rows from ours, with replacement, many times, and look how the mean moves. The middle 95% of those means is the
# interval.
#
# Rows with the same prompt are not independent. A model that knows one pirate prompt knows the next. So not rows are
# drawn but whole prompt clusters.


# %%
def bootstrap(values: np.ndarray, clusters: np.ndarray, repeats: int = 2000) -> np.ndarray:
    """95% interval of the mean of values [n], drawing whole clusters with replacement: array [low, high]."""
    groups = pd.Series(values).groupby(np.asarray(clusters)).agg(["sum", "count"]).to_numpy()  # [clusters, 2]
    drawn = np.random.default_rng(0).integers(len(groups), size=(repeats, len(groups)))
    sums, counts = groups[drawn].sum(1).T  # [repeats] each
    return np.quantile(sums / counts, [0.025, 0.975])


for name in test_sets:
    rows = scores[(scores["method"] == "fine-tuned") & (scores["test_set"] == name)]
    low, high = bootstrap(rows["scs"].to_numpy(), rows["prompt_cluster"].to_numpy())
    print(f"fine-tuned, {name}: {rows['scs'].mean():.3f}, interval {low:.3f} to {high:.3f}, n = {len(rows)}")

# %% [markdown]
# Read such a line as: with other prompts of the same kind the mean would plausibly lie anywhere between the two ends.
#
# ### Paired differences
#
# Two overlapping intervals do not mean that two methods are equally good. Some rows are easy for everybody, some for
# nobody, and that spread sits in both intervals. Subtracting row by row takes it out: the difference to the best
# constant, *on the same row*, has an interval of its own. If that one lies wholly above zero, the method is better.

# %%
columns = ["test_set", "method", "mean", "low", "high", "difference", "difference_low", "difference_high"]
parts = [compare(rows, baseline="best constant").assign(test_set=name) for name, rows in scores.groupby("test_set")]
comparison = pd.concat(parts, ignore_index=True)[[*columns, "n", "clusters"]]
comparison = comparison.assign(scorer=scorer.name)
write_table(comparison, out / "comparison.csv")
print("scorer:", scorer.name)
comparison.drop(columns="scorer").round(3)


# %%
def of(name: str) -> pd.DataFrame:
    """The comparison on one test set."""
    return comparison[comparison["test_set"] == name]


def gains(name: str) -> pd.DataFrame:
    """The paired differences on one test set, named as the figure wants them."""
    new = {"difference": "mean", "difference_low": "low", "difference_high": "high"}
    rows = of(name)[of(name)["method"] != "best constant"]
    return rows[["method", *new]].rename(columns=new)


largest_first = held_out["test_set"].value_counts().index
rewriter_set = next((name for name in largest_first if name != "hand-written"), "hand-written")

# %% [markdown]
# ### On the rewriter's rows

# %%
figure = plots.method_intervals(of(rewriter_set))
figure

# %%
figure = plots.paired_differences(gains(rewriter_set))
figure

# %% [markdown]
# Filled dots are methods whose whole interval lies on one side of zero; a hollow dot means that this sample cannot
# tell the method from the best constant.
#
# ### On the hand-written rows

# %%
figure = plots.method_intervals(of("hand-written"))
figure

# %%
figure = plots.paired_differences(gains("hand-written"))
figure

# %% [markdown]
# Here the picture turns. The fine-tuned model, ahead on the rewriter's rows, lies **below** the constant: it
# answers with a prompt of the grammar, a definite one, and a definite wrong answer scores less than a vague one.
# These prompts and rewrites have little in common with the rules most of its training data came from, and a few
# million parameters carry little over. Retrieval is hardly above the constant. The predicted embedding, said in joined
# prompts, is far above it; the predicted vectors themselves score higher still, so much is lost on the way to words.
#
# This is the more honest of the two pictures. Nobody should conclude from it that fine-tuning does not work (7B
# adapters reached .61 to .62 on the leaderboard where a constant had .60), nor from the first one that it does.

# %% [markdown]
# ## What is behind the mean
#
# ### Row by row

# %%
figure = plots.score_distributions(scores[scores["test_set"] == rewriter_set])
figure

# %% [markdown]
# A constant scores a little on every row. A model that understands the change scores high on some rows and near zero
# on others, because the cube rewards a hit far more than it punishes a miss. That is also why strong entries
# *combined* the two: a model's answer with a mean prompt behind it.
#
# ### Prompt by prompt

# %%
shown = scores[(scores["test_set"] == rewriter_set) & scores["method"].isin(["best constant", "fine-tuned"])]
figure = plots.scores_by_cluster(shown)
figure

# %% [markdown]
# The mean is made by a part of the prompts. Clusters on the left are the ones to read when looking for what to
# improve; clusters on the right are wordings close to what was trained.
#
# ### Was training long enough?

# %%
history = read_table(adapter / "history.csv")
figure = plots.training_curves(history)
figure

# %% [markdown]
# The lower curve is measured on validation prompts with the score itself; the ringed point is the adapter that we
# just evaluated. A curve that still rises at its end asks for more steps; a loss that falls while the score does not
# is learning by heart.
#
# ### Where the answers lie

# %%
tuned = scored[(scored["method"] == "fine-tuned") & (scored["test_set"] == rewriter_set)]
texts = tuned["true_prompt"].tolist() + tuned["rewrite_prompt"].tolist()
figure = plots.prompts_in_space(scorer.encode(texts), ["true"] * len(tuned) + ["predicted"] * len(tuned))
figure

# %%
for name, column in (("true", "true_prompt"), ("predicted", "rewrite_prompt")):
    print(f"{name}: {tuned[column].nunique()} different prompts on {len(tuned)} rows")

# %% [markdown]
# A model that is unsure falls back on a few safe answers, and the predicted dots crowd where the true ones spread.
# Counting the different answers shows how far that has gone.
#
# ### Best, median, worst

# %%
ranked = tuned.sort_values("scs").merge(test[["id", "original_text", "rewritten_text"]], on="id")
places = {"worst": [0, 1], "median": [len(ranked) // 2 - 1, len(ranked) // 2], "best": [-2, -1]}
picked = pd.concat([ranked.iloc[rows].assign(place=name) for name, rows in places.items()])
for column in ("original_text", "rewritten_text", "true_prompt", "rewrite_prompt"):
    picked[column] = [textwrap.shorten(text, 90, placeholder=" ...") for text in picked[column]]
columns = ["place", "scs", "original_text", "rewritten_text", "true_prompt", "rewrite_prompt"]
picked[columns].round(2)

# %% [markdown]
# Read both columns of texts before the score: sometimes the change is plain and the model missed it, sometimes no
# reader could have told. Only the first kind can be trained away.

# %% [markdown]
# ## How to read this result
#
# Four things belong to every number, and a number without them is worth little:
#
# * **n and the interval.** With a few hundred rows, differences of .02 are noise more often than not. Look at the
#   paired difference, not at the third decimal of two means.
# * **The scorer.** A proxy's scale is its own.
# * **The split.** Here no prompt cluster and no original is on two sides. With a split by rows the same model could
#   score far higher and know no more.
# * **The source of the rewrites.** A stand-in number says that the steps fit together and that the model learned
#   rules that somebody wrote down. It says nothing about Gemma's rewrites, where one prompt leads to a thousand
#   texts.
#
# And one trap: choosing the best of seven methods *on* these rows makes the winner's score a little too good, because
# part of what made it win was luck. A clear margin survives that; where the paired interval touches zero, the winner is
# a pick, not a finding, until it is measured again on fresh rows.

# %%
evidence = "hand-written" if profile.rewriter == "rules" else rewriter_set
best = of(evidence).iloc[0]
print(f"best on {evidence}: {best['method']}, {best['mean']:.3f} ({best['low']:.3f} to {best['high']:.3f})")
print(
    f"against the best constant: {best['difference']:+.3f} ({best['difference_low']:+.3f} to {best['difference_high']:+.3f})"
)

# %% [markdown]
# Offline the hand-written rows decide, as they are nearer to the task than the stand-in's. On Kaggle the rows that
# Gemma rewrote decide.
#
# Everything a program may want to know goes into one file.

# %%
report = {
    "profile": profile.name,
    "scorer": scorer.name,
    "scorer_of_record": scorer.exact,
    "settings": dataclasses.asdict(settings),
    "test_sets": {
        name: {
            "n": int(of(name)["n"].iloc[0]),
            "methods": of(name).drop(columns=["test_set", "scorer"]).to_dict("records"),
        }
        for name in test_sets
    },
    "seconds": seconds,
    "method_chosen_on": evidence,
    "best_method": best["method"],
}
write_json(report, out / "report.json")
print("seconds by method:", seconds)

# %% [markdown]
# ## Submit
#
# On Kaggle the competition's `test.csv` lies among the inputs; what we see there is one row, which is exchanged for
# the hidden ones when the notebook is scored. Offline the held-out hand-written rows stand in for it, without their
# prompts.

# %%
columns = ["id", "original_text", "rewritten_text"]
stand_in = held_out.loc[held_out["test_set"] == "hand-written", columns].reset_index(drop=True)
test_file = stand_in if to_submit is None else to_submit
whole = test_file[columns].fillna("").apply(lambda texts: texts.str.strip() != "").all(axis=1)
print("rows:", len(test_file), "- with both texts:", whole.sum())

# %% [markdown]
# The best method answers. Rows that lack a text, should there be any, cannot be asked about; they and all blank
# answers get the fallback before anything is written.

# %%
recoverers = {
    "constant": constant,
    "best constant": Constant(constants.get(evidence, constant.prompt)),
    "retrieval": retrieval,
    "embedding": predicted,
    "zero-shot": language_model("zero-shot", test_file),
    "few-shot": language_model("few-shot", test_file, shots=shots),
    "fine-tuned": language_model("fine-tuned", test_file, adapted=True),
}
asked = test_file[whole]
answered = asked[["id"]].assign(rewrite_prompt=recoverers[best["method"]].recover(asked))
filled = fill_blanks(test_file[["id"]].merge(answered, on="id", how="left"))
path = write_submission(filled, out / "submission.csv", ids=test_file["id"])
print("wrote", path.name, "with", len(filled), "rows by", best["method"])

# %% [markdown]
# `write_submission` refuses a blank, a missing or an unknown id. Still, read the file back as the scorer will, with
# plain pandas, and look.

# %%
check = pd.read_csv(path, dtype={"id": str})
assert list(check.columns) == ["id", "rewrite_prompt"]
assert check["id"].tolist() == test_file["id"].tolist()
assert check["rewrite_prompt"].notna().all() and check["rewrite_prompt"].str.strip().ne("").all()
write_manifest(
    path, started=started, profile=profile.name, seed=settings.seed, rows=len(check),
    method=best["method"], chosen_on=evidence, scorer=scorer.name,
)  # fmt: skip
check.head(3)

# %% [markdown]
# :::{tip}
# Plain pandas reads a cell that says `None`, `NA` or `null` as *no value*, and a model can answer with such a word.
# `fill_blanks` replaces it, and the check above would catch it.
# :::
#
# ## Summary
#
# * The score compares wordings, not intentions: fair readings of one rewrite can score near zero against each other.
# * A constant is a real opponent. Everything was compared with the best one, row by row, with intervals drawn by
#   prompt cluster.
# * Base, few-shot and fine-tuned model are one object in memory; requests go through sorted by length; answers are
#   logged as they come.
# * `submission.csv` holds one non-blank prompt for every id, and was read back.
#
# **How this differs from the documents it descends from, and why.** The tutorial reports .7818 on 600 rows. Its
# prompts come from one bank and its rows were split at random, so test prompts were also training prompts; it scores
# with the Hugging Face version of sentence-t5, which cuts at 256 tokens where the competition's cuts at 128 and reads
# `</s>` differently. It generated 35 tokens one row at a time, 74 minutes for 600 rows; batches sorted by length do
# the same work in a fraction of the calls. The paper began with GPT-2, whose answers it calls completely irrelevant,
# and reached .569 with Gemma-2B after training on 1,000 rows, .437 to .506 on 8,000, with the loss on the whole text;
# differences of that size need intervals, and Part 2 puts the loss on the answer alone.
#
# **Next.** Attach the TensorFlow sentence-t5 and Gemma-7b-it on Kaggle and run the same three parts: every number
# above changes, no cell does. What brought others further (their own figures): joining the answers of four models,
# .62 to .64; a mean prompt behind the answer, .66; predicting the prompt's embedding and decoding it, .71 on their
# own validation rows; in {doc}`1-generate-data`, cleaner and more even data, .60 to .62.
