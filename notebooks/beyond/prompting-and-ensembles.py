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
# # Prompting and ensembles
#
# **Ask a language model in many ways: with solved examples, with a forced opening, several times over. Then choose.**
#
# | | |
# |---|---|
# | accelerator | none |
# | time | about a minute and a half on one CPU core |
# | reads | the shipped triples; Part 2's adapter and `benchmarks/compare.json`, where the clone has them |
# | writes | `prompting-answers.csv`: what each way answered, with its manifest |
# | prerequisites | {doc}`../3-evaluate` |

# %% [markdown]
# ## The idea
#
# Nothing is trained in the first half of this page. The weights stay as they are, and only the question changes: what stands before it, how the
# answer has to begin, how often it is asked. In the competition such changes were cheap and moved the score, most of all
# with models of seven billion parameters that can follow instructions.
#
# :::{warning}
# The model here has 4.5 million parameters and was not made to follow instructions. It shows how each way works, and what it costs; it
# cannot show what a large model would gain. All settings for large models are in `promptrec.prompting.LARGE`.
# :::
#
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

import numpy as np
import pandas as pd
import torch

from promptrec import plots
from promptrec.comparison import interval
from promptrec.data import shipped_triples, slice_words
from promptrec.findings import comparison_claims, comparison_rows
from promptrec.inference import best_constant, normalise
from promptrec.language_model import token_ids
from promptrec.lora import ADAPTER
from promptrec.methods import Task
from promptrec.prompting import Way, answer_in_ways, build_opened, build_opening_verbs, build_prompted, settings_for
from promptrec.scoring import profile_scorer, scs, unit
from promptrec.shots import LIKENESS, SimilarShots, shot_pool
from promptrec.tables import write_manifest, write_table
from promptrec.templates import chat_of, recovery_request
from promptrec.text_features import LAST, text_encoder

pd.set_option("display.max_colwidth", 110)
started = time.time()

# %% [markdown]
# ## Configuration
#
# * **train_rows**, **test_rows**: shipped triples that examples are taken from, and held-out ones to answer. They share
#   neither originals nor prompt clusters.
# * **sampled_rows**, **samples**: rows that are answered several times, and how often at each temperature.


# %%
@dataclass(frozen=True)
class AskingSettings:
    """How much is asked."""

    train_rows: int = 500
    test_rows: int = 80
    sampled_rows: int = 40
    samples: int = 4
    temperatures: tuple = (0.3, 0.6, 0.9, 1.2)
    seed: int = 0


settings = override(AskingSettings(), seed=0)
asking = settings_for(profile, seed=settings.seed)
print(describe(settings), describe(asking), sep="\n\n")

# %%
train, test = (
    shipped_triples([split]).sample(frac=1, random_state=settings.seed).head(rows).reset_index(drop=True)
    for split, rows in (("train", settings.train_rows), ("test", settings.test_rows))
)
seen = test.drop(columns=["rewrite_prompt", "prompt_cluster"])  # what a recoverer gets
scorer = profile_scorer(profile)
truth = scorer.encode(test["rewrite_prompt"].tolist())  # [n, d]
task = Task(profile, train, shipped_triples(["validation"]), Path(profile.out) / "adapter", settings.seed)
adapted = (task.adapter / ADAPTER).is_file()
records, answers = {}, {}


def keep(name: str, texts: list[str]) -> pd.DataFrame:
    """Note what a way of asking answered and scores; return all that was noted so far."""
    answers[name] = texts
    mean, low, high = interval(scs(scorer.encode(texts), truth), test["prompt_cluster"])
    records[name] = {"mean": mean, "low": low, "high": high}
    return pd.DataFrame.from_dict(records, orient="index").rename_axis("method").reset_index().round(4)


print(f"{len(train)} training triples, {len(test)} test triples; scorer {scorer.name}")
print(
    "asked from 'Forced openings' on:", "the model with Part 2's adapter" if adapted else "the base: no adapter found"
)

# %% [markdown]
# ## Zero-shot: just ask
#
# The request holds the two texts and one question. It comes from `promptrec.templates`, the same function for every model
# and every notebook. The floor is the one sentence that scores best on the training prompts.

# %%
row = seen.iloc[0]
print(recovery_request(row["original_text"][:160] + " ...", row["rewritten_text"][:160] + " ...", profile.chat))

# %%
zero_shot = build_prompted(task)
keep("best constant", [best_constant(train["rewrite_prompt"].tolist(), scorer)] * len(test))
keep("zero-shot", zero_shot.recover(seen))

# %%
pd.DataFrame({"asked": test["rewrite_prompt"], "answered": answers["zero-shot"]}).head(5)

# %% [markdown]
# ## Solved examples: which ones?
#
# Few-shot prompting puts solved triples before the question. The model may imitate their form, their length, and, if an
# example resembles the row, their words. So the choice matters: at random; for **diversity**, one triple from each group
# of prompts (k-means, as in Zhang et al., 2022); or by **similarity** to the row (Liu et al., 2021).
#
# Similar in what? Two pairs may be alike in what they are about, or in what was *done* to the text. The second is what
# the prompt says, and the difference of the two embeddings is a guess at it.

# %%
pool = shot_pool(train, asking.pool, asking.shot_words, asking.seed)
encoder = text_encoder()


def changes(pairs: pd.DataFrame) -> np.ndarray:
    """Where each rewrite went, seen from its original: unit vectors [n, d]."""
    old, new = (unit(encoder.encode(pairs[name].tolist())[:, LAST]) for name in ("original_text", "rewritten_text"))
    return unit(new - old)


nearest = (changes(seen) @ changes(pool).T).argmax(1)
print("asked:   ", test["rewrite_prompt"][0])
print("example: ", pool["rewrite_prompt"][nearest[0]])

# %% [markdown]
# Before any language model is asked, one can see how near the prompt of the chosen example is to the true one: take the
# example's prompt itself as the answer.

# %%
for likeness in LIKENESS:
    shots = SimilarShots(pool, 1, asking.shot_words, likeness, encoder)(seen)
    keep(f"the example alike in: {likeness}", [prompt for ((_, _, prompt),) in shots])
drawn = np.random.default_rng(settings.seed).integers(len(pool), size=len(test))
keep("an example at random", pool["rewrite_prompt"].iloc[drawn].tolist())

# %%
plots.method_intervals(keep("zero-shot", answers["zero-shot"]))

# %% [markdown]
# `PromptingSettings.likeness` says which reading is used below. It was set by validation rows of both kinds, rule-made and
# hand-written, and not by these.

# %% [markdown]
# Now the model sees the examples, the most similar one last, next to the question. Every example costs the tokens of two
# texts on every row; that is why their texts are cut.

# %%
seconds = {}
for kind in ("random", "diverse", "similar"):
    few_shot = build_prompted(task, kind)
    began = time.process_time()
    keep(f"few-shot, {kind}", few_shot.recover(seen))
    seconds[kind] = (time.process_time() - began) / len(test)
print("seconds a row:", {kind: round(value, 3) for kind, value in seconds.items()})
keep("zero-shot", answers["zero-shot"])

# %% [markdown]
# ## Forced openings
#
# A model that is asked for a prompt likes to chat. The fourth place put the first words into its mouth: *"Modify this
# text by"*. The model's turn begins with these words, and it goes on from there, token by token. That keeps the answer to
# the right kind, and it shares words with many prompts, whatever follows.
#
# The loop itself, without cache and batches:

# %%
asked = build_prompted(task, adapted=adapted)
model, tokenizer = asked.model, asked.tokenizer
requests = [
    recovery_request(slice_words(old, asking.text_words), slice_words(new, asking.text_words), profile.chat)
    for old, new in zip(seen["original_text"], seen["rewritten_text"], strict=True)
]


@torch.inference_mode()
def go_on(request: str, opening: str, tokens: int = 16) -> str:
    """The opening and the likeliest tokens after it."""
    ids = token_ids(tokenizer, request) + token_ids(tokenizer, opening, begin=False)
    begun = len(token_ids(tokenizer, request))
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids], device=model.device), logits_to_keep=1).logits[0, -1].argmax()))
        if tokenizer.decode(ids[-1:]) == chat_of(profile.chat).after_model:
            break
    return normalise(tokenizer.decode(ids[begun:]))


for opening in ("", "Improve this text by", "Modify this text by"):
    print(f"{opening or '(free)':<22}", go_on(requests[0], opening))

# %% [markdown]
# In batches the openings are forced by a logits processor, which leaves one token possible as long as the opening lasts
# (`promptrec.prompting.InWays`). The opening alone, as a constant, shows how much of the score is the opening's.

# %%
keep("free", asked.recover(seen))
for opening in ("Improve this text by", "Modify this text by"):
    keep(f"{opening} ...", build_opened(task, opening, adapted).recover(seen))
    keep(f"{opening} (nothing more)", [opening] * len(test))
table = keep("zero-shot", answers["zero-shot"])
plots.method_intervals(table[table["method"].str.contains("free|this text|constant")])

# %% [markdown]
# ## Several opening verbs
#
# The first place's models began with different verbs. Here one model answers once for each of several openings, and its
# own mean log-probability of the answer's tokens takes one. A request is read once: the cache of its keys and values is
# copied for every opening.

# %%
ways = [Way(opening) for opening in asking.openings]
tried, likelihood = [], []
for start in range(0, len(requests), 8):
    texts, nats = answer_in_ways(
        model, tokenizer, requests[start : start + 8], ways, chat_of(profile.chat).after_model, asking.new_tokens
    )
    tried, likelihood = [*tried, *texts], [*likelihood, *nats]
likelihood = np.array(likelihood)  # [n, k]
pd.DataFrame({"answer": tried[0], "mean log-probability": likelihood[0].round(3)})

# %%
scores = np.stack([scorer.scs([normalise(text) for text in column], test["rewrite_prompt"].tolist())
                   for column in zip(*tried, strict=True)], axis=1)  # fmt: skip
picked = likelihood.argmax(1)
pd.DataFrame({
    "opening": [*asking.openings, "the likeliest", "the best in hindsight"],
    "rows taken": [*np.bincount(picked, minlength=len(ways)), len(test), len(test)],
    "SCS": [*scores.mean(0), scores[np.arange(len(test)), picked].mean(), scores.max(1).mean()],
}).round(4)  # fmt: skip

# %% [markdown]
# The distance between the last two rows is what a better choice could gain. A likelihood prefers what is common; whether
# that is what scores is for the table to say. As a method of the comparison:

# %%
keep("opening verbs", build_opening_verbs(task, adapted).recover(seen)).tail(1)

# %% [markdown]
# ## Many samples, one answer
#
# At a temperature above zero the model answers differently each time. Its samples can be taken as its belief about the
# prompt, and then the answer to give is not the likeliest one but the one with the **highest mean score to all the
# others**: minimum Bayes risk (Eikema and Aziz, 2020, for translation), with SCS as the utility.
#
# Temperature is a trade: cold samples repeat each other and leave nothing to choose, hot ones wander off.


# %%
def of_least_risk(texts: list[str]) -> int:
    """The sample with the highest mean SCS to all samples of its row."""
    vectors = scorer.encode(texts)  # [k, d]
    return int(((vectors @ vectors.T) ** 3).mean(1).argmax())


def sample(temperature: float) -> list[list[str]]:
    """Samples of each of the first rows, [n][k]."""
    torch.manual_seed(settings.seed)
    found, repeated = [], [Way(temperature=temperature)] * settings.samples
    for start in range(0, min(settings.sampled_rows, len(requests)), 8):
        part = requests[start : min(start + 8, settings.sampled_rows)]
        found += answer_in_ways(model, tokenizer, part, repeated, chat_of(profile.chat).after_model, asking.new_tokens)[
            0
        ]
    return [[normalise(text) for text in texts] for texts in found]


# %%
samples = {temperature: sample(temperature) for temperature in settings.temperatures}
rows = []
for temperature, found in samples.items():
    reached = (
        np.stack([scorer.encode(texts) @ wanted for texts, wanted in zip(found, truth, strict=False)]) ** 3
    )  # [n, k]
    least = [of_least_risk(texts) for texts in found]
    rows.append({
        "temperature": temperature,
        "distinct answers": np.mean([len(set(texts)) for texts in found]),
        "mean of the samples": reached.mean(),
        "chosen by least risk": reached[np.arange(len(found)), least].mean(),
        "best in hindsight": reached.max(1).mean(),
    })  # fmt: skip
by_temperature = pd.DataFrame(rows).set_index("temperature")
by_temperature.round(4)

# %% [markdown]
# All temperatures together make one larger, mixed sample. The method `sampled` chooses from a smaller mixture:
# one sample at each of .5, .8 and 1.1.

# %%
mixed = [[text for texts in row for text in texts] for row in zip(*samples.values(), strict=True)]
number = int(np.argmax([len(set(texts)) for texts in mixed]))
print("asked:  ", test["rewrite_prompt"][number])
print("chosen: ", mixed[number][of_least_risk(mixed[number])])
for text in dict.fromkeys(mixed[number][:: settings.samples]):
    print("sample: ", text)

# %%
count = len(mixed)
pooled = [texts[of_least_risk(texts)] for texts in mixed]
of_pool = {"one sample": [texts[0] for texts in mixed], "least risk": pooled, "greedy": answers["free"][:count]}
clusters = test["prompt_cluster"][:count]
found = {name: interval(scs(scorer.encode(texts), truth[:count]), clusters) for name, texts in of_pool.items()}
plots.method_intervals(pd.DataFrame(found, index=["mean", "low", "high"]).T.rename_axis("method").reset_index())

# %% [markdown]
# ## Prompting in the comparison
#
# The same ways of asking on the comparison's test rows, beside the constants. *difference* is to the best constant, row
# by row; rows whose interval (*difference_low* to *difference_high*) lies above zero beat it. Names that begin with
# `fine-tuned` start from the adapter. Only methods that have run are shown.

# %%
ASKED = ["zero-shot", "few-shot", "few-shot-similar", "few-shot-diverse"]
OPENED = ["prefix-improve", "prefix-modify", "opening-verbs", "sampled"]
comparison_rows(["best-constant", *ASKED, *OPENED, "fine-tuned", *(f"fine-tuned-{name}" for name in OPENED)])

# %%
out = Path(profile.out)
path = write_table(test[["id"]].assign(**answers), out / "prompting-answers.csv")
write_manifest(
    path, started=started, profile=profile.name, seed=settings.seed, rows=len(test),
    settings=settings, asking=asking, scorer=scorer.name,
)  # fmt: skip
print(f"{path.name}: {len(test)} rows")

# %% [markdown]
# ## Choosing and joining
#
# So far every method answered by itself. Now there are several answers to each row, and something is to be made of them:
# **choose** one, or **join** them. Almost every winner of the competition joined something, and the gain was often larger
# than that of a larger model. All ways below work on others' answers, in columns `answer:METHOD` of a table, and what
# there is to choose beforehand (an order, a gate, trusts) is chosen on validation triples with their own prompts.

# %%
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from promptrec import choosing, joining, plots, predictor
from promptrec.comparison import interval
from promptrec.data import shipped_triples
from promptrec.embedding import EmbeddingRecoverer, RetrievalRecoverer
from promptrec.inference import Constant, answer_column, best_constant
from promptrec.language_model import answer_log_likelihood, load_model, load_tokenizer
from promptrec.methods import Task
from promptrec.predictor import PredictorSettings
from promptrec.profiles import describe, override
from promptrec.prompt_bank import shipped_prompts
from promptrec.prompting import build_prompted
from promptrec.scoring import encode_candidates, get_scorer, scs
from promptrec.templates import rewrite_request

# %% [markdown]
# * **learn_rows**, **choose_rows**, **answer_rows**: shipped triples to fit the parts on, to choose by, and to answer.
#   No two of the three share a prompt cluster.
# * **more_prompts**: shipped prompts in the bank beside those of the triples.


# %%
@dataclass(frozen=True)
class EnsembleSettings:
    """How much the parts are fitted on, and how many rows are chosen by and answered."""

    learn_rows: int = 200
    choose_rows: int = 40
    answer_rows: int = 60
    more_prompts: int = 800
    seed: int = 0


ensemble = override(EnsembleSettings(), seed=0)
print(describe(ensemble))

# %%
scorer = get_scorer("minilm")
learn, held, asked = (
    shipped_triples([split]).sample(frac=1, random_state=ensemble.seed).head(rows).reset_index(drop=True)
    for split, rows in (
        ("train", ensemble.learn_rows),
        ("validation", ensemble.choose_rows),
        ("test", ensemble.answer_rows),
    )
)
truth = scorer.encode(asked["rewrite_prompt"].tolist())  # [n, d]
bank = shipped_prompts()["rewrite_prompt"].sample(ensemble.more_prompts, random_state=ensemble.seed)
scored: dict[str, np.ndarray] = {}


def note(answers: dict[str, list[str]]) -> pd.DataFrame:
    """Score ways of answering the rows asked about, and show what was scored here."""
    told = {name: scs(scorer.encode(texts), truth) for name, texts in answers.items()}
    scored.update(told)
    rows = {name: interval(values, asked["prompt_cluster"]) for name, values in told.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "low", "high"]).round(4)


# %% [markdown]
# ### The parts
#
# Four methods that err in different ways: the embedding method, the nearest prompt, a constant, and the fine-tuned model
# of Part 2 where its adapter lies in the output folder. (Without it the other three have to do.) Last, what nobody may
# use: an **oracle** that picks the best answer of each row by the truth. It says how much choosing can gain at most.

# %%
embedding = EmbeddingRecoverer(
    scorer, bank, PredictorSettings(folds=2, most_steps=60, seed=ensemble.seed)
).fit(learn)  # fmt: skip
parts = {
    "embedding": embedding,
    "retrieval": RetrievalRecoverer(scorer, bank).fit(learn),
    "best-constant": Constant(best_constant(learn["rewrite_prompt"].tolist(), scorer)),
}
adapter = Path(profile.out) / "adapter"
if (adapter / "adapter_config.json").is_file():
    parts["fine-tuned"] = build_prompted(Task(profile, learn, held, adapter, ensemble.seed), adapted=True)
held, asked = (
    table.assign(**{answer_column(name): part.recover(table) for name, part in parts.items()})
    for table in (held, asked)
)

# %%
candidates = choosing.candidates_of(asked)  # [n, methods]
vectors = encode_candidates(scorer, candidates.to_numpy())  # [n, methods, d]
reached = scs(vectors, truth[:, None])  # [n, methods]
best = candidates.to_numpy()[np.arange(len(asked)), reached.argmax(1)].tolist()
note({**{name: candidates[name].tolist() for name in candidates}, "(oracle)": best})

# %% [markdown]
# ### Agreement
#
# If two methods that know nothing of each other say nearly the same, it is probably right. So: the answer with the highest
# mean SCS to the row's other answers, the **medoid**. It costs one small matrix a row. Its weakness is that methods that
# read the same features agree for that reason alone.

# %%
alike = np.einsum("nid,njd->nij", vectors, vectors) ** 3  # [n, methods, methods]
medoid = (alike.sum(2) - 1).argmax(1)
assert (medoid == choosing.agreement(candidates.to_numpy(), scorer).argmax(1)).all()
agreed = candidates.to_numpy()[np.arange(len(asked)), medoid].tolist()
note({"agreement": agreed})

# %% [markdown]
# ### A language model as judge
#
# Show a model both texts and the numbered candidates, and ask which is right. A written answer would have to be parsed: it
# may name two numbers or none. The **probability of each number** as the next token is always there, takes one pass and no
# generation, and can be averaged. That is needed, because models prefer places (Zheng et al., 2023): each candidate
# stands once in each place, and what a place is worth by itself falls out of the mean.

# %%
model, tokenizer = load_model(profile.base_model), load_tokenizer(profile.base_model)
row = asked.iloc[0]
options = [text[:90] for text in candidates.iloc[0]]
request = choosing.judge_request(row["original_text"][:160], row["rewritten_text"][:160], options)
print(request)
numbers = [str(place + 1) for place in range(len(options))]
print(choosing.first_token_logs(model, tokenizer, [request], numbers).round(2))

# %%
judge = choosing.Asked(model, tokenizer, profile.chat, override(choosing.ChoosingSettings(), seed=ensemble.seed))
verdicts = judge.judge(asked, candidates.to_numpy())  # [n, methods], the mean over places
places = np.bincount(verdicts.argmax(1), minlength=candidates.shape[1])
print("chosen:", dict(zip(candidates, places.tolist(), strict=True)))
note({"judge": choosing.Chooser("judge", lambda *_: verdicts).recover(asked)})

# %% [markdown]
# ### Forward likelihood
#
# The other way round: do not ask which prompt fits the rewrite, but how probable the **rewrite** is given the prompt. The
# rewriting model knows that exactly, token by token, and nobody has to be taught anything. On the competition's rows this
# would be Gemma-7b-it; here the tiny Gemma stands for it, which has learned to rewrite by rules and not
# to write as the far larger models did that wrote these rows.

# %%
lines = [rewrite_request(row["original_text"][:160], prompt, profile.chat) for prompt in candidates.iloc[0]]
likely = answer_log_likelihood(model, tokenizer, lines, [row["rewritten_text"][:160]] * len(lines))
print("asked:", row["rewrite_prompt"])
pd.DataFrame({"candidate": candidates.iloc[0], "log-probability of a token": likely.round(3)})

# %% [markdown]
# A prompt may make every rewrite probable, "Repeat the text" for one. The usual remedy, to subtract the likelihood without a
# prompt or averaged over other prompts, does nothing here: it is the same number for all candidates of a row. What does
# change the choice is to subtract how probable a candidate makes the rewrites of *other* pairs: the **contrastive** form.

# %%
others = learn.drop_duplicates("rewrite_prompt").head(2)
plain = judge.likelihood(asked, candidates.to_numpy())
contrast = judge.contrast(asked, candidates.to_numpy(), others)
chosen = {"forward likelihood": plain, "contrastive likelihood": contrast}
changed = (plain.argmax(1) != contrast.argmax(1)).mean()
print(f"the contrast changes the choice in {changed:.0%} of the rows")
note({name: choosing.Chooser(name, lambda *_, told=told: told).recover(asked) for name, told in chosen.items()})

# %% [markdown]
# How well does each rating know the good answers? The rank correlation of ratings and scores within a row, on average;
# 0 is what drawing lots would reach.

# %%
ratings = {"agreement": alike.sum(2), "judge": verdicts, **chosen}
within = {
    name: pd.DataFrame(told).T.corrwith(pd.DataFrame(reached).T, method="spearman").mean()
    for name, told in ratings.items()
}
pd.DataFrame({"mean rank correlation with SCS": within}).round(3)

# %% [markdown]
# ### Minimum Bayes risk
#
# The embedding method's posterior says how probable each prompt of the bank is. Then the best candidate is the one with
# the highest expected score under it, and candidates may come from anywhere: all parts' answers and the whole bank (Kumar
# and Byrne, 2004, for translation). The embedding method's own answer is left out, to show what
# choosing alone can do: it was made to come near the posterior's mean vector, not to score best under the posterior, and by
# this measure it would often lose to a worse prompt.

# %%
without = asked.drop(columns=answer_column("embedding"))
bayes = choosing.BayesRisk(embedding).recover(without)
banked = np.mean([answer in set(embedding.bank) for answer in bayes])
print(f"{banked:.0%} of the answers are prompts of the bank")
note({"mbr": bayes})

# %% [markdown]
# ### Concatenation
#
# The encoder averages over tokens, so two answers in a row land between the two. Which answers, and in what order? Greedily
# by the score on the validation rows: take the part and the place that gain most, as long as something gains. Repeated
# sentences are left out, and each sentence gets one stop. Where nothing gains, the join is one part's answer alone.

# %%
print(joining.join_answers(["Shout it..", "Make it sad", "shout it!"]))
concatenation = joining.Concatenation(scorer).fit(held)
print("order:", " + ".join(concatenation.order))
note({"concatenation": concatenation.recover(asked)})

# %% [markdown]
# ### Gate, tags, clusters
#
# The 3rd place's string has four pieces: a mean prompt; the prompt of the row's **cluster** (12 k-means clusters of prompts,
# each with its own best constant, and a classifier that guesses the cluster); **tags**, the content words that a logistic
# regression finds likely; and a language model's answer, but only where a **gate** trusts it. The gate is a logistic
# regression too, fitted on whether the answer beat the mean prompt.

# %%
trusted = "fine-tuned" if "fine-tuned" in parts else "retrieval"
gated = joining.GateTagsClusters(
    scorer, embedding.features, override(joining.JoiningSettings(), trusted=trusted, seed=ensemble.seed)
).fit(learn, held)
pieces = gated.pieces(asked)
print("joined:", " + ".join(gated.order), f"- the gate trusts {(pieces['gated answer'] != '').mean():.0%} of {trusted}")
pieces.assign(asked=asked["rewrite_prompt"]).head(4)

# %%
note({"gate, tags, clusters": gated.recover(asked)})

# %% [markdown]
# ### One posterior from everything
#
# Joining strings throws away how sure each method was. The **blend** keeps it: the embedding method's posterior is the
# prior, and each answer raises the prompts of the bank that are like it,
# $w_b \propto p_b \, e^{\sum_k t_k \cos(a_k, b)}$, with one trust $t_k \ge 0$ for each method. The bank may lack what an
# answer found, so each answer is believed itself, too, by $t_k / (24 + \sum_k t_k)$. The trusts are those with which the
# blend's mean direction scores best on the validation rows, and only the result is decoded to a string, once.

# %%
believed = embedding.posterior(held)
answers = encode_candidates(scorer, choosing.candidates_of(held).to_numpy())  # [n, methods, d]
trust = 4.0 * np.eye(answers.shape[1])[1]  # by hand: trust the second method only
moved = np.log(believed.weights) + trust @ (answers @ believed.bank.T)  # [n, bank]
moved = np.exp(moved - moved.max(1, keepdims=True))
moved, shares = moved / moved.sum(1, keepdims=True), trust / (24 + trust.sum())
mean = (1 - shares.sum()) * moved @ believed.bank + np.einsum("k,nkd->nd", shares, answers)
print("the same vectors:", np.allclose(unit(mean), predictor.blend(believed, answers, trust).vectors, atol=1e-5))

# %%
blend = joining.Blend(embedding, override(joining.JoiningSettings(), seed=ensemble.seed)).fit(held)
print("trusts:", {name: round(value, 2) for name, value in blend.trust.items()})
note({"blend": blend.recover(asked)})

# %% [markdown]
# ### All together
#
# First the scores, then each way's difference to the best single part on the same rows. An interval that holds zero means
# that these rows do not tell the two apart.

# %%
summary = pd.DataFrame(
    [(name, *interval(values, asked["prompt_cluster"])) for name, values in scored.items()],
    columns=["method", "mean", "low", "high"],
)
plots.method_intervals(summary)

# %%
single = max(parts, key=lambda name: scored[name].mean())
gains = {name: values - scored[single] for name, values in scored.items() if name != single and name != "(oracle)"}
print("best single part:", single)
plots.paired_differences(
    pd.DataFrame(
        [(name, *interval(values, asked["prompt_cluster"])) for name, values in gains.items()],
        columns=["method", "mean", "low", "high"],
    )
)

# %% [markdown]
# ### In the comparison
#
# The same methods with parts fitted on all training triples, a bank of all prompts and more rows. *difference* is to the
# best constant.

# %%
ensembles = ["agreement", "judge", "forward-likelihood", "contrastive-likelihood", "mbr", "concatenation",
             "gate-tags-clusters", "blend"]  # fmt: skip
singles = ["embedding", "retrieval", "best-constant", "fine-tuned"]
comparison_rows([*singles, *ensembles]).round(4)

# %% [markdown]
# Claims about choosing and joining, the blend's among them, as paired differences on the same rows of the comparison. A
# claim is confirmed or refuted only where the interval excludes zero.

# %%
comparison_claims(ensembles).round(4)
