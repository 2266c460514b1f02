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
# # Infilling and encoder-decoders
#
# **Two ways to recover a prompt that are older than chat models: fill in blanks between the two texts, or read both with
# an encoder and let a decoder write.**
#
# | | |
# |---|---|
# | accelerator | none |
# | time | about a minute and a half on one CPU core |
# | reads | rule-made triples and the shipped ones; `benchmarks/compare.json`, where the clone has it |
# | writes | nothing |
# | prerequisites | {doc}`../3-evaluate` |

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
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from promptrec import plot_style, plots
from promptrec.comparison import interval
from promptrec.data import EASY_STYLES, shipped_originals, slice_words
from promptrec.encoder_decoder import EncoderDecoderRecoverer, EncoderDecoderSettings
from promptrec.findings import comparison_rows
from promptrec.inference import best_constant
from promptrec.infilling import InfillingRecoverer, InfillingSettings
from promptrec.prompt_bank import grammar_prompts
from promptrec.rewriters.rules import RulesRewriter
from promptrec.scoring import get_scorer
from promptrec.small_models import frame

pd.set_option("display.max_colwidth", 90)

# %% [markdown]
# ## Configuration
#
# * **train_rows**, **test_rows**: triples to learn from and to answer; they share no prompt.
# * **steps**: of training, for each model of the demonstrations. The comparison's models get more of them.
# * **scs_steps**: with the differentiable SCS as loss, which costs more a step.
# * **lengths_tried**: numbers of masks among which the likeliest is chosen.


# %%
@dataclass(frozen=True)
class DemonstrationSettings:
    """How much the demonstrations train and answer."""

    train_rows: int = 800
    test_rows: int = 60
    steps: int = 70
    scs_steps: int = 30
    lengths_tried: int = 4
    seed: int = 0


settings = override(DemonstrationSettings(), seed=0)
print(describe(settings))

# %% [markdown]
# The demonstrations use triples that rules have rewritten, because small models learn those in minutes. The comparison's
# rows at the end of each section are on both kinds of data.

# %%
rows = settings.train_rows + settings.test_rows
texts = shipped_originals()["text"].map(lambda text: slice_words(text, 30))
triples = pd.DataFrame({"original_text": texts.sample(rows, replace=True, random_state=settings.seed).tolist()})
prompts = grammar_prompts(rows, settings.seed, styles=EASY_STYLES, mixture_share=0.0)["rewrite_prompt"].tolist()
triples["rewrite_prompt"] = prompts
triples["rewritten_text"] = RulesRewriter(settings.seed).rewrite(triples["original_text"].tolist(), prompts)
train, test = triples.head(settings.train_rows), triples.tail(settings.test_rows).reset_index(drop=True)

scorer, records = get_scorer("minilm"), {}


def score(name: str, answers: list[str]) -> pd.DataFrame:
    """Note the mean SCS of answers to the test rows, with its interval; return all that was noted so far."""
    mean, low, high = interval(scorer.scs(answers, test["rewrite_prompt"].tolist()))
    records[name] = {"mean": mean, "low": low, "high": high, "different answers": len(set(answers))}
    return pd.DataFrame.from_dict(records, orient="index").round(3)


score("best constant", [best_constant(train["rewrite_prompt"].tolist(), scorer)] * len(test))

# %% [markdown]
# ## Infilling
#
# BERT was trained to fill in masked words from what stands on both sides. The paper of Gan et al. (2024, section 3.4)
# puts the prompt where BERT can see both texts at once, and hides it:
#
# > original. The task is to rewrite this narrative with the given blanks: [MASK] [MASK] [MASK] rewritten
#
# The loss sees the masks only, and all are filled at once: each gets its likeliest token without knowing what the others
# get. In training there are as many masks as the prompt has tokens. For a new row that number is unknown; the paper draws
# it from the training prompts' lengths.
#
# Here the model is MiniLM's encoder, cut to its lower layers, with a fresh head tied to its word embeddings. A folder with
# `bert-base-uncased` is a setting.

# %%
quick = InfillingSettings(steps=settings.steps, lengths_tried=settings.lengths_tried, seed=settings.seed)
infilling = InfillingRecoverer(quick)
tokenizer, mask = infilling.tokenizer, infilling.tokenizer.mask_token_id
((original, rewritten),) = infilling.encode(train.head(1))
prompt = tokenizer(train["rewrite_prompt"][0], add_special_tokens=False)["input_ids"]
ids = frame(original, rewritten, infilling.task + [mask] * len(prompt), room=quick.max_tokens - 2)
print(tokenizer.decode(ids))
print("wanted:", tokenizer.decode(prompt))

# %% [markdown]
# The step that is repeated, for one row: hidden states of the whole sequence, logits at the masks, cross-entropy with the
# prompt. Before training the head knows nothing.

# %%
ids = torch.tensor([tokenizer.cls_token_id, *ids, tokenizer.sep_token_id])
with torch.no_grad():
    hidden = infilling.model.base_model(ids[None]).last_hidden_state[0]  # [t, d]
    logits = infilling.model.cls(hidden[ids == mask])  # [masks, vocabulary]
loss = torch.nn.functional.cross_entropy(logits, torch.tensor(prompt))
print(f"{len(ids)} tokens, logits {tuple(logits.shape)}, loss {loss:.2f}; chance is {np.log(logits.shape[1]):.2f}")

# %%
infilling.fit(train)
answers = infilling.recover(test)
score("infilling, length drawn", answers)

# %% [markdown]
# ### Choosing the length by likelihood
#
# A drawn length is wrong for most rows. One can fill in several numbers of masks and keep the answer that the model itself
# finds likeliest, by the mean log-probability of its tokens. The curves show it for four rows.


# %%
def likelihoods(rows: pd.DataFrame, lengths: list[int]) -> Figure:
    """Mean log-probability of what is filled in, by the number of masks, a curve for each row."""
    encoded = infilling.encode(rows)
    found = np.array([infilling.fill(encoded, [length] * len(rows))[1] for length in lengths])  # [lengths, rows]
    wanted = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in rows["rewrite_prompt"]]
    with matplotlib.rc_context(plot_style.STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        for curve, true, colour, style in zip(found.T, wanted, plot_style.PALETTE, ("-", "--", "-.", ":")):
            axes.plot(lengths, curve, color=colour, linestyle=style, marker="o", label=f"a prompt of {true} tokens")
        axes.set(xlabel="masks", ylabel="mean log-probability")
        axes.legend()
    told = ", ".join(f"{lengths[best]} masks where {true} were right" for best, true in zip(found.argmax(0), wanted))
    return plot_style.alt_text(figure, f"Mean log-probability by the number of masks for four rows; the best: {told}.")


likelihoods(test.head(4), [4, 6, 8, 10, 12, 14, 16])

# %%
infilling.settings = replace(quick, length="likelihood")
by_likelihood = infilling.recover(test)
score("infilling, length by likelihood", by_likelihood)

# %% [markdown]
# In the curves the likelihood still rises at the longest length tried, or close to it: the mean over tokens favours long
# answers. After so few steps it says nearly the same to all rows, and scores less than a length drawn; with the
# comparison's steps it scores more (see below).
#
# Answers as they came. Where a word is said twice, or an article stands alone, one sees that no mask knew what the others
# would get.

# %%
pd.DataFrame({"asked": test["rewrite_prompt"], "length drawn": answers, "by likelihood": by_likelihood}).head(6)

# %% [markdown]
# A step further, not in the comparison (`shown` and `passes` in the settings): some of the prompt's tokens are shown in
# training, and answers are filled in over several passes, the surest tokens first (mask-predict, Ghazvininejad et al.,
# 2019).
#
# ### The score as a loss
#
# The paper scores the filled-in prompt with sentence-t5 and trains on that score. But a chosen token has no gradient.
# What can be differentiated is the *expected* embedding of each mask: its distribution over the vocabulary times the table
# of word embeddings. These go through the frozen scorer (here MiniLM), and the loss is $-\cos^3$ to the true prompt.

# %%
table = scorer.model[0].auto_model.get_input_embeddings().weight.detach()  # [vocabulary, d]
sure, torn = torch.zeros(2, len(table))
sure[tokenizer.convert_tokens_to_ids("pirate")] = 1
torn[tokenizer.convert_tokens_to_ids(["pirate", "recipe"])] = 0.5
for name, shares in {"sure of 'pirate'": sure, "torn between 'pirate' and 'recipe'": torn}.items():
    near = torch.nn.functional.cosine_similarity(shares @ table, table).topk(3).indices
    print(f"{name}: the expected embedding is nearest to {tokenizer.convert_ids_to_tokens(near)}")

# %% [markdown]
# A mixture of words is a point between them that no token has. So the expected score is not the score of what will be said,
# and from an untrained head, whose distributions are wide, the cube leaves almost no slope to follow. Here with this loss
# alone, and mixed half and half with cross-entropy:

# %%
for name, share in {"SCS loss alone": 1.0, "half SCS, half cross-entropy": 0.5}.items():
    quick_scs = replace(quick, steps=settings.scs_steps, scs_share=share, length="likelihood")
    one = InfillingRecoverer(quick_scs, name).fit(train)
    said = one.recover(test)
    ended = np.mean(one.losses[-5:])
    print(f"{name}: loss {one.losses[0]:.3f} -> {ended:.3f}; first answer: {said[0]}")
    score(name, said)
score("infilling, length by likelihood", by_likelihood)

# %% [markdown]
# ### In the comparison

# %%
comparison_rows(["infilling", "infilling-likelihood", "infilling-scs"]).round(4)

# %% [markdown]
# ## Encoder-decoders
#
# Translation models read with an encoder and write with a decoder that attends to what was read. The same paper (section
# 3.3) uses BERT for reading and GPT-2 for writing, first joined by the library's `EncoderDecoderModel`, then by a
# *bridge* of its own: max-pooling over all hidden states and three linear layers. In training the decoder is given the
# true tokens so far (teacher forcing), in answering its own.
#
# Pooling leaves one vector of a whole pair of texts, and nothing in it is told to be the *difference* of the texts, which is
# what the paper set out to capture. The third bridge here keeps the sequence and encodes that difference. Each text is
# encoded apart, each token of the rewritten one attends to the original, and what it finds there is subtracted.
#
# The encoder is frozen, so it runs once over the training texts. The decoder is a GPT-2 of two layers, from scratch.

# %%
first = train.head(8)
reader = EncoderDecoderRecoverer(EncoderDecoderSettings(bridge="sequence"))
hidden = []
for column in ("original_text", "rewritten_text"):
    batch = reader.reader(first[column].tolist(), padding=True, return_tensors="pt", truncation=True, max_length=32)
    with torch.no_grad():
        hidden.append(reader.encoder(**batch).last_hidden_state)  # [n, t, d]
before, after = hidden
weights = (after @ before.transpose(1, 2) / after.shape[-1] ** 0.5).softmax(-1)  # [n, t rewritten, t original]
change = after - weights @ before  # what the original does not explain
print("of each token's length, the part that is new:", (change.norm(dim=-1) / after.norm(dim=-1)).mean(1))

# %% [markdown]
# That is the idea without weights; the bridge learns its own attention (`promptrec.encoder_decoder.Difference`). All
# three, trained alike:

# %%
losses, written = {}, {}
for bridge in ("none", "pooled", "sequence"):
    small = EncoderDecoderSettings(
        bridge=bridge, steps=settings.steps, rows=settings.train_rows, longest_prompt=16, seed=settings.seed
    )
    one = EncoderDecoderRecoverer(small).fit(train)
    losses[bridge], written[bridge] = one.losses, one.recover(test)
    shown = score(f"bridge: {bridge}", written[bridge])
shown


# %%
def loss_curves(losses: dict[str, list[float]], window: int = 5) -> Figure:
    """Training loss of each bridge, averaged over a few steps."""
    with matplotlib.rc_context(plot_style.STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        smooth = {name: pd.Series(values).rolling(window, min_periods=1).mean() for name, values in losses.items()}
        for (name, values), colour, style in zip(smooth.items(), plot_style.PALETTE, ("-", "--", "-.")):
            axes.plot(values, color=colour, linestyle=style, label=name)
        axes.set(xlabel="step", ylabel="cross-entropy per token")
        axes.legend(title="bridge")
    told = ", ".join(f"{name} {values.iloc[-1]:.2f}" for name, values in smooth.items())
    return plot_style.alt_text(figure, f"Training loss by step for each bridge; at the end: {told}.")


loss_curves(losses)

# %% [markdown]
# What they wrote. A decoder learns first how prompts are worded, so that its answers may look like prompts from early on.
# Whether they are the *right* prompts is another matter, and the loss need not show it: the paper saw its loss fall while its
# answers stayed wrong.

# %%
pd.DataFrame({"asked": test["rewrite_prompt"], **written}).head(6)

# %%
plots.method_intervals(pd.DataFrame.from_dict(records, orient="index").rename_axis("method").reset_index())

# %% [markdown]
# ### In the comparison

# %%
comparison_rows(["encoder-decoder", "bridge-pooled", "bridge-sequence"]).round(4)

# %% [markdown]
# ## Inversion of the predicted embedding
#
# A sentence's embedding says more about the sentence than one would think: a decoder trained on pairs of text and
# embedding can write much of it back (GEIA, Li et al. 2023; vec2text, Morris et al. 2023). The competition's 4th place
# named it as a way to use a *predicted* embedding: predict the vector as in {doc}`from-embedding-to-prompt`, then let the
# decoder say it. The decoder needs no triples, only prompts, of which there can be as many as one likes.
#
# The vector takes the place of the first words: a linear map turns it into a few **prefix vectors**, and a small causal
# language model goes on from there. A predicted vector is not a true one, so the decoder is trained on vectors with
# **noise**, up to the error that the predictor has on held-out prompt clusters.

# %%
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from promptrec import inversion, plots
from promptrec.data import shipped_triples
from promptrec.decoding import DecodingSettings, improve
from promptrec.embedding import EmbeddingRecoverer
from promptrec.predictor import PredictorSettings
from promptrec.profiles import describe, override
from promptrec.prompt_bank import shipped_prompts
from promptrec.scoring import get_scorer, scs

# %% [markdown]
# * **inverted_train**, **inverted_test**: triples that the vector's predictor is fitted on, and held-out ones.
# * **bank_rows**: shipped prompts beside those of the triples, which the decoder learns to write.
# * **decoder_steps**: of training; the comparison takes more.
# * **polished_rows**, **evaluations**: rows that are searched on, and strings a row that this may encode.


# %%
@dataclass(frozen=True)
class InversionDemo:
    """How much is trained, written and polished."""

    inverted_train: int = 300
    inverted_test: int = 60
    bank_rows: int = 1500
    decoder_steps: int = 110
    polished_rows: int = 12
    evaluations: int = 40
    seed: int = 0


demo = override(InversionDemo(), seed=0)
print(describe(demo))

# %%
scorer = get_scorer("minilm")
train, held, test = (
    shipped_triples([split]).sample(frac=1, random_state=demo.seed).head(rows).reset_index(drop=True)
    for split, rows in (("train", demo.inverted_train), ("validation", 32), ("test", demo.inverted_test))
)
predictor = EmbeddingRecoverer(
    scorer,
    bank=shipped_prompts()["rewrite_prompt"].sample(demo.bank_rows, random_state=demo.seed),
    settings=PredictorSettings(folds=2, most_steps=100, seed=demo.seed),
).fit(train)
posterior, truth = predictor.posterior(test), scorer.encode(test["rewrite_prompt"].tolist())

# %% [markdown]
# How far off are predicted vectors? The cosine on held-out prompt clusters becomes the length of the noise: a unit vector
# with noise of length $\sqrt{1 / c^2 - 1}$ at right angles to it has cosine $c$ to what it was.

# %%
cosine = (predictor.posterior(held).vectors * scorer.encode(held["rewrite_prompt"].tolist())).sum(1).mean()
noise = inversion.noise_of(cosine)
print(f"mean cosine of predicted and true vectors: {cosine:.2f}; so the noise in training is up to {noise:.2f} long")

# %% [markdown]
# One step of training, written out: the prefix stands where words would stand, and the loss is the usual one over the
# prompt's tokens.

# %%
decoder = inversion.EmbeddingDecoder(profile.base_model, dimensions=truth.shape[1], prefix=4)
vectors = inversion.noisy(torch.as_tensor(predictor.vectors[:2]), noise, torch.Generator().manual_seed(0))
prefix = decoder.prefix(vectors).view(2, 4, -1)  # [n, k, width]: the vector as four words that nobody wrote
ids = decoder.encode(predictor.bank[0], max_tokens=32)[None]  # [1, t]
read = torch.cat([prefix[:1], decoder.embed(ids)], dim=1)
labels = torch.cat([torch.full((1, 4), -100), ids], dim=1)
print(
    "the model reads",
    tuple(read.shape),
    "and its loss is",
    decoder.model(inputs_embeds=read, labels=labels).loss.item(),
)

# %%
chosen = override(inversion.InversionSettings(), steps=demo.decoder_steps, seed=demo.seed)
began = time.time()
decoder = inversion.train_decoder(predictor.bank, predictor.vectors, profile.base_model, chosen, noise)
print(f"{len(predictor.bank):,} prompts, {chosen.steps} steps of {chosen.batch_size}: {time.time() - began:.0f} s")

# %% [markdown]
# ### True vectors against predicted ones
#
# Two things can fail: the decoder, when it cannot write back even a *true* vector of a prompt it never saw, and the
# prediction. Writing from both shows how much is lost to each. (True vectors are not to be had at test time; they are
# here for the diagnosis only.)

# %%
written = {
    "greedy, true vector": [texts[0] for texts in decoder.write(truth, chosen.max_tokens)],
    "greedy, predicted vector": [texts[0] for texts in decoder.write(posterior.vectors, chosen.max_tokens)],
}
drawn = decoder.write(posterior.vectors, chosen.max_tokens, chosen.samples, chosen.temperature)
candidates = [[greedy, *more] for greedy, more in zip(written["greedy, predicted vector"], drawn)]
written["best expected of several"] = inversion.choose_written(posterior, candidates, scorer)
scored = {name: scs(scorer.encode(texts), truth) for name, texts in written.items()}
scored["the predicted vector itself"] = scs(posterior.vectors, truth)
pd.DataFrame({name: {"mean SCS": values.mean(), "n": len(values)} for name, values in scored.items()}).T.round(4)


# %%
def cumulative(scored: dict[str, np.ndarray]) -> Figure:
    """Share of rows that score at least so much, a line for each way of answering."""
    with matplotlib.rc_context(plot_style.STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        for (name, values), colour, line in zip(scored.items(), plot_style.PALETTE, ("-", "--", "-.", ":")):
            axes.step(
                np.sort(values), 1 - np.arange(len(values)) / len(values), color=colour, linestyle=line, label=name
            )
        axes.set(xlabel="SCS", ylabel="share of rows that score more")
        axes.legend()
    told = ", ".join(f"{name} {values.mean():.3f}" for name, values in scored.items())
    return plot_style.alt_text(figure, f"Share of rows above each score; means: {told}.")


cumulative(scored)

# %%
for place in np.linspace(0, len(test) - 1, 4).astype(int):
    print("asked:         ", test["rewrite_prompt"][place])
    for name, texts in written.items():
        print(f"  {name:>26}: {texts[place]}")

# %% [markdown]
# ### Polished
#
# What the decoder wrote can be the start of the word search of {doc}`from-embedding-to-prompt`, towards the row's own
# predicted vector. It comes nearer to the *vector*; whether it raises the score is another matter, as the vector is all it
# knows.

# %%
few = min(demo.polished_rows, len(test))
part = posterior.of(range(few))
starts, began = written["best expected of several"][:few], time.time()
polished = improve(
    part.vectors, starts, predictor.bank, scorer, DecodingSettings(evaluations=demo.evaluations, seed=demo.seed)
)
print(f"{few} rows, {(time.time() - began) / few:.2f} s a row")
pd.DataFrame({
    name: {
        "cosine with the vector": (part.vectors * scorer.encode(texts)).sum(1).mean(),
        "reached": scs(scorer.encode(texts), truth[:few]).mean(),
    }
    for name, texts in {"as written": starts, "polished": polished}.items()
}).T.round(4)  # fmt: skip

# %% [markdown]
# ### In the comparison
#
# *embedding* says the same vector with prompts of the bank, joined; *inversion* with words of its own.

# %%
comparison_rows(["embedding", "inversion", "inversion-polished"]).round(4)
