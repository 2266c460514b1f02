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
# # What the metric rewards
#
# **Why vague answers, joined answers and strange words such as `lucrarea` scored so well, how to find such words for any
# encoder, and how to keep them out.**
#
# | | |
# |---|---|
# | accelerator | none |
# | time | about a minute on two CPU cores |
# | reads | the shipped prompts and originals; optionally a sentence-t5 |
# | writes | `vocabulary-scan.csv`, every piece of the vocabulary with its estimated effect, and its manifest |
# | prerequisites | {doc}`../3-evaluate` up to the metric; {doc}`mean-prompts` for the gradient |

# %% [markdown]
# ## The question
#
# The winning answers of the competition were those of four language models, joined, and behind them a suffix that ends
# in *"lucrarealucrarealucrarea"*. Nobody would call that a recovered prompt. It is what the metric asked for, and a metric
# is best understood by asking what it pays for. Three answers, each measured below:
#
# 1. **Not committing.** When unsure, the cube of the cosine pays for lying between the possibilities.
# 2. **Common words.** Words that many prompts share raise the score of an answer that says nothing else.
# 3. **Holes in the encoder.** Some tokens pull every sentence towards every other one.
#
# ```{image} ../../images/cos3.svg
# :alt: Curve of the score, the cube of the cosine. A vague constant answer at cosine 0.83 scores 0.58, a good answer at 0.89 scores 0.71, the exact prompt at 1 scores 1. The curve grows steeper to the right.
# :width: 100%
# ```
#
# :::{warning}
# The scorer here is MiniLM, a proxy, with its own scale and its own holes. What is said about sentence-t5 is cited, or
# measured where one is attached.
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
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from promptrec import plot_style
from promptrec.data import shipped_originals
from promptrec.prompt_bank import shipped_prompts
from promptrec.scoring import Scorer, get_scorer
from promptrec.search_encoders import SearchEncoder, encoder_of
from promptrec.splits import cluster_prompts
from promptrec.tables import write_manifest, write_table
from promptrec.token_search import Objective, SearchSettings, search

pd.set_option("display.max_colwidth", 120)
started = time.time()

# %% [markdown]
# ## Configuration
#
# * **answers**: the short prompts that pieces are appended to. More of them, less noise, longer run.
# * **checked**: how many pieces from either end of the ranking, and from anywhere, are encoded exactly.
# * **sentence_t5**: a folder with sentence-transformers/sentence-t5-base, or its TensorFlow SavedModel.


# %%
@dataclass(frozen=True)
class MetricSettings:
    """How much is measured."""

    prompts: int = 500
    answers: int = 12
    drawn: int = 16  # words appended to each answer, to take the gradient at
    checked: int = 20
    pairs: int = 150  # of unlike and like prompts
    evaluations: int = 250  # of each search
    sentence_t5: str = ""
    seed: int = 0


# %%
settings = override(MetricSettings(), seed=0)
random = np.random.default_rng(settings.seed)
print(describe(settings))

# %%
folder = Path(settings.sentence_t5 or ("" if profile.scorer == "minilm" else profile.scorer_model))
kind = "t5-tf" if (folder / "saved_model.pb").is_file() else "t5-hf"
t5 = get_scorer(kind, str(folder)) if folder.name and folder.is_dir() else None
scorer = get_scorer("minilm")
scorers = [scorer, t5] if t5 else [scorer]
print("scorers:", ", ".join(one.name for one in scorers))
print(
    "" if t5 else "no sentence-t5 is attached: what needs one is skipped (MetricSettings.sentence_t5 names its folder)"
)

# %% [markdown]
# ## What an unrelated answer gets
#
# Pairs of prompts from different clusters: one is taken for the answer, the other for the truth. What does such an
# answer score, knowing nothing?

# %%
prompts = shipped_prompts()["rewrite_prompt"].sample(settings.prompts, random_state=settings.seed).tolist()
clusters = cluster_prompts(scorer.encode(prompts))
first, second = np.triu_indices(len(prompts), 1)
apart = clusters[first] != clusters[second]
first, second = first[apart], second[apart]
cosines = {one.name: (one.encode(prompts) @ one.encode(prompts).T)[first, second] for one in scorers}
rows = [(name, len(c), c.mean(), (c**3).mean()) for name, c in cosines.items()]
pd.DataFrame(rows, columns=["scorer", "pairs", "mean cosine", "mean SCS"]).round(4)


# %%
def histograms(cosines: dict[str, np.ndarray]) -> Figure:
    """Cosines of unrelated prompts above, what the cube makes of them below; one outline for each scorer."""
    with matplotlib.rc_context(plot_style.STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        above, below = figure.subplots(2, sharex=True)
        bins = np.linspace(-0.2, 1, 61)
        for (name, values), colour, line in zip(cosines.items(), plot_style.PALETTE, ("-", "--")):
            for axes, shown in ((above, values), (below, values**3)):
                style = {"histtype": "step", "color": colour, "linestyle": line, "linewidth": 1.8, "density": True}
                axes.hist(shown, bins, label=f"{name} (mean {shown.mean():.3f})", **style)
        above.set(ylabel="density", title="cosine")
        below.set(ylabel="density", title="cosine³ = SCS", xlabel="value for one pair of unrelated prompts")
        for axes in (above, below):
            axes.legend(loc="upper right")
    means = "; ".join(f"{name}: cosine {c.mean():.2f}, SCS {(c**3).mean():.3f}" for name, c in cosines.items())
    return plot_style.alt_text(figure, f"Histograms of cosine and SCS of unrelated prompts. Means: {means}.")


# %%
histograms(cosines)

# %%
values = np.sort(cosines[scorer.name] ** 3)[::-1]
for share in (0.01, 0.05, 0.25):
    points = values[: int(len(values) * share)].sum() / values.sum()
    print(f"the best {share:.0%} of the pairs bring {points:.0%} of all points")

# %% [markdown]
# Under MiniLM an unrelated answer gets next to nothing, and what it gets comes from few pairs that happen to be near:
# the cube discards the rest. sentence-t5 has a **floor**. Measured on 1,427 real pairs of prediction and truth, its
# cosine is about .75 + .23 times MiniLM's, so an unrelated answer starts at a cosine near .75, which is .42 points for
# nothing. All that is left to compete for lies between .42 and 1.
#
# ## Commit or hedge
#
# The floor decides a question that every answer has to settle. Say the truth is one of $n$ prompts, equally likely, any
# two of them at cosine $c$. One can **commit**: name one of them. Then the expected score is
# $\frac{1 + (n-1)c^3}{n}$. Or **hedge**: answer the direction between them all. Its cosine with each is
# $\sqrt{\frac{1 + (n-1)c}{n}}$, the score that to the third power, for certain.


# %%
def commit(n: int, c: np.ndarray) -> np.ndarray:
    """Expected SCS of naming one of n prompts at cosine c from each other."""
    return (1 + (n - 1) * c**3) / n


def hedge(n: int, c: np.ndarray) -> np.ndarray:
    """SCS of the direction between them."""
    return ((1 + (n - 1) * c) / n) ** 1.5


# %%
floors = {"MiniLM": cosines[scorer.name].mean(), "sentence-t5": 0.75}
c = np.linspace(0, 1, 101)
with matplotlib.rc_context(plot_style.STYLE):
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    for n, colour in ((2, plot_style.BLUE), (10, plot_style.VERMILLION), (100, plot_style.GREEN)):
        axes.plot(c, hedge(n, c), color=colour, label=f"hedge, n = {n}")
        axes.plot(c, commit(n, c), "--", color=colour, label=f"commit, n = {n}")
    for name, floor in floors.items():
        axes.axvline(floor, color=plot_style.GREY, linestyle=":")
        place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom", "size": 9}
        axes.annotate(f"{name}: {floor:.2f}", (floor, 1.01), **place)
    axes.set(xlabel="cosine c between the possible prompts", ylabel="expected SCS", ylim=(0, 1))
    figure.legend(loc="outside right upper")
told = [f"{name}, n = {n}: {hedge(n, f) - commit(n, f):+.2f}" for name, f in floors.items() for n in (2, 100)]
plot_style.alt_text(
    figure, f"Expected score of hedging and committing against cosine. Hedge minus commit: {'; '.join(told)}."
)

# %%
rows = {(name, n): (commit(n, f), hedge(n, f)) for name, f in floors.items() for n in (2, 10, 100)}
pd.DataFrame(rows, index=["commit", "hedge"]).T.round(3)

# %% [markdown]
# Between two possibilities and without a floor, committing is better: half of the time one is right. With the floor of
# sentence-t5, hedging wins from two possibilities on, and with a hundred it gets .65 where committing gets .43. That is
# an idealised count (real prompts are not equally far from each other), and yet it is near what happened: searched
# constants at .69, and the joined answers of four models at .64 where each alone had .62.
#
# Can a *string* hedge? Two requests, joined, against each of them:

# %%
possible = ["Rewrite the text as a poem", "Rewrite the text as a formal letter", "Make the text sound like a pirate"]
answers = [*possible, " ".join(possible[:2]), " ".join(possible), "Rewrite the text"]
scores = scorer.encode(answers) @ scorer.encode(possible).T
pd.DataFrame(scores**3, index=answers, columns=["poem", "letter", "pirate"]).assign(mean=(scores**3).mean(1)).round(2)

# %% [markdown]
# The last column is the expected score if the three are equally likely. Joining serves several possibilities at once and
# none of them fully; under MiniLM, as the count says for low cosines, that is no gain. Saying less than any of them
# ("Rewrite the text") is the worst here, and is what a constant does.
#
# ## Scanning a vocabulary
#
# Now to single words. Which piece of the encoder's vocabulary, appended to an answer, raises its mean score against all
# prompts, and which lowers it? Trying tens of thousands of pieces on a dozen answers is hundreds of thousands of encodings. The gradient needs a few
# hundred.
#
# To estimate what an appended piece is worth, append *some* word, take the gradient of the objective at its place, and
# see where in the embedding table it points. One word is a poor vantage point, as the encoder is anything but linear;
# averaged over many words and answers the estimate becomes useful. All that is left is one product with the embedding
# table.


# %%
def scan(encoder: SearchEncoder, answers: list[str], objective: Objective) -> np.ndarray:
    """Estimated change [V] of the answers' mean value when a piece of the vocabulary is appended."""
    random = np.random.default_rng(settings.seed)
    ids = [encoder.token_ids(word) for word in encoder.whole_words()]
    whole = [one[0] for one in ids if len(one) == 1]
    rows = [[*encoder.token_ids(text), int(word)] for text in answers for word in random.choice(whole, settings.drawn)]
    vectors, slopes = encoder.gradient(rows, [objective] * len(rows))
    slopes = np.stack([slope[-1] for slope in slopes])  # [rows, D], at the appended word
    there = encoder.embedding_matrix[[row[-1] for row in rows]]
    levels = objective.value(vectors) - (slopes * there).sum(1)
    return encoder.embedding_matrix @ slopes.mean(0) + levels.mean() - objective.value(encoder.encode(answers)).mean()


def tail(encoder: SearchEncoder, piece: str, times: int = 1) -> str:
    """What to append to a text; a piece that does not begin a word is glued to the last one."""
    return encoder.join(["x", *[piece] * times])[1:]


def gains(encoder: SearchEncoder, answers: list[str], objective: Objective, tails: list[str]) -> np.ndarray:
    """The exact change for each tail, from text: of the mean value of the answers with it appended."""
    texts = [text + tail for tail in ["", *tails] for text in answers]
    means = objective.value(encoder.encode(texts)).reshape(-1, len(answers)).mean(1)
    return means[1:] - means[0]


# %%
def short_texts(texts: list[str], count: int) -> list[str]:
    """Some texts of at most a dozen words, without a final stop, so that a piece can be glued on."""
    short = [text.rstrip(" .!?\"'") for text in texts if len(text.split()) <= 12]
    return [short[index] for index in random.choice(len(short), count, replace=False)]


# %%
encoder = encoder_of(scorer)
answers = short_texts(prompts, settings.answers)
all_prompts = Objective.mean(scorer.encode(prompts))
began = time.time()
estimates = scan(encoder, answers, all_prompts)
print(f"{len(estimates):,} pieces, {settings.answers * settings.drawn} backward passes, {time.time() - began:.0f} s")
print("an answer:", answers[0])

# %% [markdown]
# The two ends of the ranking, and some from anywhere, are now encoded exactly.


# %%
def checked(encoder: SearchEncoder, estimates: np.ndarray, answers: list[str], objective: Objective) -> pd.DataFrame:
    """Pieces from the top, the bottom and anywhere, with estimated and exact gain."""
    ordinary = np.array([index for index in range(len(encoder.pieces)) if encoder.is_ordinary(index)])
    order, count = ordinary[np.argsort(-estimates[ordinary])], settings.checked
    parts = {"top": order[:count], "bottom": order[-count:], "anywhere": random.choice(ordinary, count, replace=False)}
    table = pd.concat([pd.DataFrame({"index": rows, "part": part}) for part, rows in parts.items()], ignore_index=True)
    table = table.assign(piece=[encoder.pieces[i] for i in table["index"]], estimated=estimates[table["index"]])
    return table.assign(exact=gains(encoder, answers, objective, [tail(encoder, piece) for piece in table["piece"]]))


# %%
pieces = checked(encoder, estimates, answers, all_prompts)
by_chance = pieces[pieces["part"] == "anywhere"]
print(f"correlation of estimate and exact gain: {by_chance['estimated'].corr(by_chance['exact']):.2f} anywhere, "
      f"{pieces['estimated'].corr(pieces['exact']):.2f} with both ends; n = {len(by_chance)} and {len(pieces)}")  # fmt: skip
pieces.groupby("part")[["estimated", "exact"]].mean().round(4)


# %%
def scatter(pieces: pd.DataFrame) -> Figure:
    """Estimated against exact gain, with the best and the worst pieces named."""
    with matplotlib.rc_context(plot_style.STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.subplots()
        for (part, rows), colour, marker in zip(
            pieces.groupby("part", sort=False), plot_style.PALETTE, plot_style.MARKERS
        ):
            axes.scatter(rows["estimated"], rows["exact"], s=26, color=colour, marker=marker, alpha=0.8, label=part)
        axes.axhline(0, color=plot_style.BLACK, linewidth=1)
        ranked = pieces.drop_duplicates("piece").sort_values("exact", ascending=False)
        named = {"highest": ranked["piece"].head(6), "lowest": ranked["piece"].tail(5)}
        told = [f"{end}: {', '.join(names)}" for end, names in named.items()]
        axes.set(xlabel="estimated change of mean SCS", ylabel="exact change of mean SCS", title="\n".join(told))
        axes.legend(loc="lower right")
    return plot_style.alt_text(
        figure, f"Estimated against exact effect of appending a piece. Exact, {'; '.join(told)}."
    )


# %%
scatter(pieces)

# %% [markdown]
# Words for texts and their kinds end up on top, words of quite other subjects at the bottom: the *topic* of a rewrite
# prompt. That is the second thing the metric pays for, and the reason why every mean prompt is full of "text",
# "story" and "write". It is not a hole. The estimate's level is off, its order is what it is good for.
#
# ## Topic, or a hole?
#
# A topical word brings prompts nearer to prompts. A **sticky** token brings *anything* nearer to anything. So repeat the
# scan on texts that are no prompts: openings of the shipped originals, against each other. Which pieces from the top of
# either ranking help on both?

# %%
originals = shipped_originals()["text"].sample(settings.prompts, random_state=settings.seed)
openings = [" ".join(text.split()[:12]) for text in originals]
neutral, all_openings = short_texts(openings, settings.answers), Objective.mean(scorer.encode(openings))
general = checked(encoder, scan(encoder, neutral, all_openings), neutral, all_openings)
general.nlargest(5, "exact")[["piece", "estimated", "exact"]].round(4)

# %%
best = pd.concat([part.loc[part["part"] == "top", "piece"] for part in (pieces, general)]).unique().tolist()
tails = [tail(encoder, piece) for piece in best]
both = pd.DataFrame({"prompts": gains(encoder, answers, all_prompts, tails)}, index=best)
both["openings"] = gains(encoder, neutral, all_openings, tails)
helps = both > 0
print(f"of {len(best)} pieces {helps['prompts'].sum()} raise prompts, {helps['openings'].sum()} openings, "
      f"{helps.all(axis=1).sum()} both")  # fmt: skip
sticky = both[helps.all(axis=1)].assign(least=both.min(axis=1)).nlargest(6, "least")
sticky.round(4)

# %% [markdown]
# What helps on both helps a little. For sentence-t5 the effect of a truly sticky token is known: one appended
# `lucrarea` raises the cosine of pairs of low similarity by .061 on average and lowers that of pairs of high similarity
# by .020 (arXiv 2507.18171). That is the mark of such a token: it pulls *towards a level*, not upwards.
#
# Do MiniLM's candidates pull like that? Pairs of prompts from far to near, a piece appended to one of the two, three
# times. (`[SEP]` is the token that MiniLM reads at the end of every text; more of it below.)

# %%
order = np.argsort(cosines[scorer.name])
levels = np.linspace(*np.quantile(cosines[scorer.name], [0, 1]), settings.pairs)  # as many far as near ones
spread = order[np.unique(np.searchsorted(cosines[scorer.name][order], levels).clip(max=len(order) - 1))]
left, right = ([prompts[index].rstrip(" .!?") for index in side[spread]] for side in (first, second))


def pull(one: Scorer, tail: str) -> dict[str, float]:
    """Mean change of the cosine, for the farther and the nearer half of the pairs, when `tail` is appended to one."""
    truth = one.encode(right)
    before, after = ((one.encode(texts) * truth).sum(1) for texts in (left, [text + tail for text in left]))
    near = before >= np.median(before)
    return {"far pairs": (after - before)[~near].mean(), "near pairs": (after - before)[near].mean()}


# %%
shown = {"helps on both": sticky.index[0] if len(sticky) else ".", "end token": "[SEP]"}
shown["topical"] = pieces.loc[pieces["exact"].idxmax(), "piece"]
rows = [{"kind": kind, "piece": piece} | pull(scorer, tail(encoder, piece, 3)) for kind, piece in shown.items()]
pd.DataFrame(rows).round(3)

# %% [markdown]
# A topical word lifts the far pairs as well, because it is about what all prompts are about, and pays for it with the
# near ones: it dilutes what they share. A sticky token would do so whatever it means. The end token, MiniLM's candidate
# for that, moves either half by a hundredth or so, where one `lucrarea` moves far pairs under sentence-t5 by six.
#
# ## The end token, and who can write it
#
# Every text that an encoder reads ends in the same special token: `</s>` for T5, `[SEP]` for MiniLM's BERT vocabulary.
# All texts have it in common, so more of it makes texts more alike; that is a plausible reading, why it pulls as it does
# is not settled. The 1st-placed team saw `</s>` pull the cosine of two vaguely similar sentences to about .9. Can a
# *text* contain it?
#
# That depends on the tokenizer, not on the model. Here is a SentencePiece vocabulary, read as TensorFlow reads it and
# as Hugging Face does. It is the real one where a sentence-t5 is attached; otherwise a small one made on the spot from
# the shipped prompts, which treats special tokens in the same way.

# %%
import sentencepiece
from transformers import T5Config, T5Tokenizer

vocabulary = folder
if not (t5 and (folder / "spiece.model").is_file()):
    vocabulary = Path(tempfile.mkdtemp())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prompts), model_prefix=str(vocabulary / "spiece"), vocab_size=400,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    T5Config(vocab_size=400).save_pretrained(vocabulary)
plain = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary / "spiece.model"))
twin = T5Tokenizer.from_pretrained(vocabulary)

# %%
shown = {}
for text in ("Rewrite this </s>", "Rewrite this lucrarea", "Rewrite thislucrarea"):
    ids = {"SentencePiece (TensorFlow)": [*plain.encode(text), 1], "Hugging Face": twin(text)["input_ids"]}
    shown[text] = {name: " ".join(map(plain.id_to_piece, row)) for name, row in ids.items()}
    shown[text]["end tokens"] = " / ".join(str(list(row).count(1)) for row in ids.values())
pd.DataFrame(shown).T

# %% [markdown]
# The Hugging Face tokenizer parses the literal `</s>` into the end token, so its text ends twice. Plain SentencePiece,
# as in the competition's TensorFlow graph, takes it for ordinary characters (with T5's own vocabulary for a space, an
# unknown, `/`, `s` and `>`). A gain from `</s>` that shows under the Hugging Face model does not exist on the leaderboard.
#
# Of the pieces of T5's vocabulary that text *can* reach, **`lucrarea`** has the embedding nearest to that of `</s>`. It
# is a Romanian word ("the work"); why it lies there, nobody has explained. So it enters by the front door where `</s>`
# is stopped, and does a weaker form of the same. Two details decide whether it works: it exists only as a
# *continuation* (" lucrarea" with a space before it is two tokens), and candidates must be re-encoded from text, because
# pieces do not always survive being joined.
#
# MiniLM has the hole in the form that Hugging Face's T5 has it: its tokenizer parses its special tokens in ordinary text.

# %%
rows = []
for token in ("[SEP]", "[CLS]", "[MASK]", "[PAD]", "</s>"):
    read = " ".join(encoder.pieces[index] for index in encoder.token_ids(token))
    rows.append([token, read, *gains(encoder, answers, all_prompts, [tail(encoder, token, n) for n in (1, 3, 8)])])
print(f"mean SCS of the answers as they are: {all_prompts.value(encoder.encode(answers)).mean():.4f}")
pd.DataFrame(rows, columns=["text", "read as", "one appended", "three", "eight"]).round(4)

# %% [markdown]
# The first four are read as themselves; `</s>` is four ordinary pieces to MiniLM, and one or three of it gain more than as
# many `[SEP]`. A few `[CLS]` are worth about as much as a good topical word, and `[MASK]` does harm. The hole is open, but there is little behind it: MiniLM has no high floor towards which everything
# could be pulled. So `lucrarea` could not have been found with MiniLM. A trick belongs to an encoder *and* to its
# tokenizer.
#
# ### With sentence-t5
#
# Where one is attached: which pieces lie nearest to `</s>`, what the scan puts on top, and what the famous pieces do.

# %%
if t5 and (t5_encoder := encoder_of(t5)):
    table = t5_encoder.embedding_matrix
    nearest = np.argsort(np.linalg.norm(table - table[1], axis=1))
    print("nearest to </s>:", [t5_encoder.pieces[i] for i in nearest if t5_encoder.is_ordinary(i)][:8])
    t5_prompts = Objective.mean(t5.encode(prompts))
    found = checked(t5_encoder, scan(t5_encoder, answers, t5_prompts), answers, t5_prompts)
    print(found.nlargest(8, "exact")[["piece", "estimated", "exact"]].round(4).to_string(index=False))
else:
    print("skipped: no sentence-t5 with open embeddings is attached")

# %%
appended = (" </s>", "lucrarea", "lucrarealucrarealucrarea", " lucrarea")
for text in appended if t5 else ():
    print(f"{text!r}:", ", ".join(f"{name} {change:+.3f}" for name, change in pull(t5, text).items()), t5.name)
print("" if t5 else "skipped: no sentence-t5 is attached")

# %% [markdown]
# ## Keep them out
#
# Pieces found by a scan are findings about an encoder. In an answer that a person should read, or that should hold
# under another scorer, they have no place. `SearchSettings.banned` takes words, phrases and pieces, in any case; a string
# that holds one *as the encoder reads it* is never encoded, whatever it scores.

# %%
worst = tuple(dict.fromkeys([*sticky.index, *pieces.nlargest(20, "exact")["piece"]]))
print("banned:", ", ".join(worst))
for banned in ((), worst):
    options = SearchSettings(level="token", evaluations=settings.evaluations, seed=settings.seed, banned=banned)
    one = search(encoder, all_prompts, "Rewrite this", options)
    held = [piece for piece in encoder.tokens(one.text) if piece in worst]
    print(f"\n{len(banned)} banned: {one.value:.4f}, {len(held)} of the listed pieces in it\n  {one.text}")

# %% [markdown]
# The price is the difference between the two values. Sometimes it is small or even negative, as a search that is kept
# from the obvious words finds others; how many others there are is one more thing the metric does not ask about.
#
# ## Keep

# %%
exact = pieces.drop_duplicates("index").set_index("index")["exact"]
table = pd.DataFrame({"piece": encoder.pieces, "estimated": estimates}).join(exact)
path = write_table(table, Path(profile.out) / "vocabulary-scan.csv")
write_manifest(
    path, started=started, profile=profile.name, seed=settings.seed, rows=len(table), settings=settings,
    scorer=scorer.name,
)  # fmt: skip
print(path.name, f"{len(table):,} pieces, {table['exact'].notna().sum()} of them exact; {scorer.name}")

# %% [markdown]
# ## Summary
#
# * sentence-t5 gives an unrelated answer a cosine near .75. With such a floor, lying between the possibilities beats
#   naming one of them, and strings can do that.
# * Words that prompts share are worth points in any answer. That is topic, not a trick.
# * A sticky token pulls every pair towards one level. `</s>` is one in sentence-t5, and text cannot hold it in the
#   competition's graph; `lucrarea` is its double, and text can.
# * Find such tokens by one scan over the vocabulary, believe exact encodings only, keep them out with a list of bans.
#
# **What a better metric would do.** Subtract the floor before the cube; compare with several scorers that do not share
# a tokenizer; ask whether the recovered prompt, given to the same model, brings the text back. None of these pays for
# `lucrarea`.
#
# **Next.** Search a string under these rules: {doc}`mean-prompts`.
