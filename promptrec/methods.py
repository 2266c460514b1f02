"""Every way of recovering a prompt by name: what `promptrec recover --method` and `promptrec compare` choose from.

A method is a row of METHODS: who had the idea, which function builds it, and whose answers it works on. A builder gets a
Task and returns a recoverer that is ready to answer. Its module is imported when it is asked for, not before.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from itertools import compress
from pathlib import Path

import numpy as np
import pandas as pd

from promptrec.cleaning import clean
from promptrec.data import load_triples, merge_triples, shipped_triples, text_id
from promptrec.errors import InputError
from promptrec.inference import Recoverer, answer_column
from promptrec.profiles import Profile
from promptrec.prompt_bank import shipped_prompts
from promptrec.scoring import Scorer, profile_scorer
from promptrec.splits import clusters_of, wordings_of


@dataclass(frozen=True)
class Task:
    """What a method may learn from: training triples, held-out ones to choose by, prompts beyond them, a seed.

    `train` and `validation` have original_text, rewrite_prompt and rewritten_text, and share no prompt cluster.
    For a method that works on others' answers, `validation` has them, too: one column `answer:METHOD` each.
    `adapter` is the folder of the fine-tuned adapter that methods of fine-tuned models start from.
    """

    profile: Profile
    train: pd.DataFrame
    validation: pd.DataFrame
    adapter: Path
    seed: int = 0
    avoid: frozenset[str] = frozenset()  # shipped prompts that are a wording of one that is to be recovered

    @property
    def scorer(self) -> Scorer:
        """What predictions are judged by."""
        return profile_scorer(self.profile)

    @cached_property
    def clusters(self) -> np.ndarray:
        """Prompt cluster of each training triple, [n]."""
        return clusters_of(self.train["rewrite_prompt"])

    @cached_property
    def bank(self) -> list[str]:
        """All prompts that may be answered with: the shipped ones but those to avoid, and those of the training triples."""
        return sorted({*shipped_prompts()["rewrite_prompt"]} - self.avoid | {*self.train["rewrite_prompt"]})


@dataclass(frozen=True)
class Method:
    """A row of METHODS. `builder` is module:function within promptrec, called with a Task and the options."""

    family: str  # its heading in the comparison
    source: str  # who had the idea
    builder: str
    options: Mapping[str, object] = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # methods whose answers it works on
    random: bool = True  # trained or sampled: another seed gives other answers
    adapted: bool = False  # starts from the fine-tuned adapter
    keras: bool = False  # whether it runs where language models run in Keras, not in torch

    def build(self, task: Task) -> Recoverer:
        """A recoverer, ready to answer."""
        module, _, function = self.builder.partition(":")
        return getattr(import_module(f"promptrec.{module}"), function)(task, **self.options)


class Joint:
    """A method that works on others' answers, and the methods it asks first."""

    def __init__(self, parts: Mapping[str, Recoverer], method: Method, task: Task, name: str) -> None:
        self.parts, self.name = parts, name
        self.method = method.build(replace(task, validation=self._answered(task.validation)))

    def recover(self, table: pd.DataFrame) -> list[str]:
        """One prompt for each row; every part answers all rows first."""
        return self.method.recover(self._answered(table))

    def _answered(self, table: pd.DataFrame) -> pd.DataFrame:
        if table.empty:
            return table
        seen = table.drop(columns="rewrite_prompt", errors="ignore")
        return table.assign(**{answer_column(name): part.recover(seen) for name, part in self.parts.items()})


def training_triples(more: Sequence[str | Path] = ()) -> pd.DataFrame:
    """The shipped training triples and the user's, cleaned; never the held-out ones of a file that has a split."""
    return clean(merge_triples([shipped_triples(["train"]), *map(_own_training_rows, more)]))[0]


def _own_training_rows(path: str | Path) -> pd.DataFrame:
    """A file's triples; where it has a split, those to train on."""
    table = load_triples(path, keep=["split"])
    if "split" not in table:
        return table
    if not (table["split"] == "train").any():
        found = ", ".join(map(repr, sorted(set(table["split"].astype(str)))[:4]))
        raise InputError(f"{path}: no row has split 'train' (found: {found}); name it so, or leave the column out")
    return table[table["split"] == "train"].drop(columns="split")


def shipped_wordings_of(prompts: Iterable[str]) -> list[str]:
    """Shipped prompts that are a wording of one of these: they may not answer rows that ask for it."""
    shipped = shipped_prompts()["rewrite_prompt"].tolist()
    return sorted(compress(shipped, wordings_of(shipped, prompts)))


def default_method(profile: Profile) -> str:
    """The best method the profile can run without the user training anything: measured on held-out shipped triples."""
    return "embedding" if profile.rewriter == "rules" else "few-shot"


def make_recoverer(
    name: str, profile: Profile, train: Sequence[str | Path] = (), adapter: str | Path | None = None, seed: int = 0
) -> Recoverer:
    """The recoverer called `name`, learnt from the shipped triples and `train`, ready to answer.

    Raises InputError for an unknown name, a missing adapter, or a method that the profile cannot run.
    """
    check_method(name, profile)
    known, held = training_triples(train), shipped_triples(["validation"])
    if train:  # the user's prompts may be wordings of the shipped held-out ones
        held = held[~wordings_of(held["rewrite_prompt"], known["rewrite_prompt"])].reset_index(drop=True)
    if METHODS[name].needs and held.empty:
        raise InputError(
            f"method {name}: the training triples hold every held-out prompt; nothing is left to choose by"
        )
    return build(name, Task(profile, known, held, _adapter_folder(profile, adapter), seed))


def run_of(
    name: str, profile: Profile, train: Sequence[str | Path] = (), adapter: str | Path | None = None, seed: int = 0
) -> str:
    """What answers depend on besides the rows, in short: method, profile, settings, seed, and what the files hold."""
    files = [*map(Path, train), *sorted(_adapter_folder(profile, adapter).glob("adapter*"))]
    held = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()]
    return text_id(name, profile.name, os.environ.get("PROMPTREC_SETTINGS", ""), str(seed), *held)


def _adapter_folder(profile: Profile, adapter: str | Path | None) -> Path:
    return Path(adapter) if adapter else Path(profile.out) / "adapter"


def build(name: str, task: Task) -> Recoverer:
    """The recoverer called `name` for a task, and before it those that it asks."""
    method = METHODS[name]
    if not method.needs:
        return method.build(task)
    return Joint({need: build(need, task) for need in method.needs}, method, task, name)


def methods_of(profile: Profile) -> list[str]:
    """The methods that the profile can run."""
    return [name for name, method in METHODS.items() if method.keras or not profile.in_keras]


def check_method(name: str, profile: Profile) -> None:
    """Raise InputError where there is no such method, or where the profile cannot run it."""
    if name not in METHODS:
        raise InputError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}")
    if name not in (can := methods_of(profile)):
        raise InputError(f"method {name}: profile {profile.name} runs no torch; choose one of {', '.join(can)}")


CANDIDATES = ("embedding", "retrieval", "fine-tuned")  # whose answers are chosen from
JOINED = (*CANDIDATES, "inversion-polished")  # and joined
IMPROVE, MODIFY = "Improve this text by", "Modify this text by"

METHODS: dict[str, Method] = {
    # --- without the texts
    "constant": Method("constants", "the competition's forum", "inference:build_constant", random=False, keras=True),
    "best-constant": Method(
        "constants", "the competition's forum", "inference:build_best_constant", random=False, keras=True
    ),
    "mean-prompt": Method("constants", "4th, 6th and 7th place", "mean_prompt:build"),
    # --- the prompt's embedding; early, because later methods read its fit from the cache
    "retrieval": Method("embeddings", "2nd place", "embedding:build_retrieval", random=False, keras=True),
    "embedding": Method("embeddings", "2nd place, decoded here", "embedding:build_embedding", keras=True),
    # --- a language model as it is
    "zero-shot": Method("prompting", "Gan et al., 3.5", "prompting:build_prompted", random=False, keras=True),
    "few-shot": Method("prompting", "cma1114", "prompting:build_prompted", {"shots": "random"}, keras=True),
    "few-shot-similar": Method("prompting", "Liu et al., 2021", "prompting:build_prompted", {"shots": "similar"}),
    "few-shot-diverse": Method("prompting", "Zhang et al., 2022", "prompting:build_prompted", {"shots": "diverse"}),
    "prefix-improve": Method("prompting", "the forum", "prompting:build_opened", {"opening": IMPROVE}, random=False),
    "prefix-modify": Method("prompting", "4th place", "prompting:build_opened", {"opening": MODIFY}, random=False),
    "opening-verbs": Method("prompting", "1st place", "prompting:build_opening_verbs", random=False),
    "sampled": Method("prompting", "Eikema and Aziz, 2020", "prompting:build_sampled"),
    # --- fine-tuned
    "fine-tuned": Method(
        "fine-tuning", "cma1114", "prompting:build_prompted", {"adapted": True}, adapted=True, keras=True
    ),
    "fine-tuned-whole": Method(
        "fine-tuning", "Gan et al., 3.5", "causal_lm:build", {"variant": "whole", "loss": "whole"}
    ),
    "fine-tuned-small": Method("fine-tuning", "Gan et al., 4.4", "causal_lm:build", {"variant": "small", "rows": 400}),
    "fine-tuned-narrow": Method(
        "fine-tuning",
        "cma1114",
        "causal_lm:build",
        {"variant": "narrow", "rows": 400, "clusters": 16},
    ),
    "fine-tuned-opening-verbs": Method(
        "fine-tuning", "1st place", "prompting:build_opening_verbs", {"adapted": True}, adapted=True
    ),
    "fine-tuned-sampled": Method(
        "fine-tuning", "Eikema and Aziz, 2020", "prompting:build_sampled", {"adapted": True}, adapted=True
    ),
    # --- rewarded with the score
    "ppo-base": Method("preferences", "Gan et al., 3.2", "ppo:build", {"start": "base"}),
    "ppo-tuned": Method("preferences", "open idea", "ppo:build", {"start": "tuned"}, adapted=True),
    "rloo": Method("preferences", "open idea", "preferences:build_rloo", adapted=True),
    "dpo": Method("preferences", "Gormann", "preferences:build_dpo", {"pairs": "own"}, adapted=True),
    "dpo-other": Method("preferences", "the forum", "preferences:build_dpo", {"pairs": "other"}, adapted=True),
    # --- an encoder
    "infilling": Method("encoders", "Gan et al., 3.4", "infilling:build", {"length": "drawn"}),
    "infilling-likelihood": Method("encoders", "open idea", "infilling:build", {"length": "likelihood"}),
    "infilling-scs": Method(
        "encoders", "Gan et al., 3.4", "infilling:build", {"length": "likelihood", "scs_share": 0.5}
    ),
    "encoder-decoder": Method("encoders", "Gan et al., 3.3", "encoder_decoder:build", {"bridge": "none"}),
    "bridge-pooled": Method("encoders", "Gan et al., 3.3", "encoder_decoder:build", {"bridge": "pooled"}),
    "bridge-sequence": Method("encoders", "the texts' difference", "encoder_decoder:build", {"bridge": "sequence"}),
    # --- from the prompt's embedding to a string
    "inversion": Method("embeddings", "4th place; GEIA", "inversion:build"),
    "inversion-polished": Method("embeddings", "open idea", "inversion:build_polished", needs=("inversion",)),
    # --- others' answers, chosen or joined
    "concatenation": Method("ensembles", "1st place", "joining:build_concatenation", needs=JOINED),
    "judge": Method("ensembles", "cma1114", "choosing:build_judge", needs=CANDIDATES),
    "agreement": Method("ensembles", "open idea", "choosing:build_agreement", needs=CANDIDATES),
    "forward-likelihood": Method("ensembles", "open idea", "choosing:build_likelihood", needs=CANDIDATES),
    "contrastive-likelihood": Method(
        "ensembles", "open idea", "choosing:build_likelihood", {"contrastive": True}, needs=CANDIDATES
    ),
    "gate-tags-clusters": Method("ensembles", "3rd place", "joining:build_gate_tags_clusters", needs=("fine-tuned",)),
    # without the answers that were joined or searched for the very score that is maximised here
    "mbr": Method("ensembles", "open idea", "choosing:build_mbr", needs=("retrieval", "fine-tuned", "inversion")),
    "blend": Method("ensembles", "open idea", "joining:build_blend", needs=JOINED),
}
