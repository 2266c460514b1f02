"""Recoverers: constants, zero-shot, few-shot and fine-tuned language models, and the one normaliser of their answers.

A Recoverer takes a table with original_text and rewritten_text and returns one prompt a row. Recoverers beyond the
main way stand beside this module and meet it in that contract.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd

from promptrec.cleaning import strip_lead_in
from promptrec.data import check_cells, text_id
from promptrec.distributed import gather, own_part, part_files, read_finished, share
from promptrec.errors import InputError
from promptrec.scoring import Scorer, scs
from promptrec.submission import FALLBACK
from promptrec.tables import append_jsonl, progress, read_jsonl, require_columns

if TYPE_CHECKING:
    from promptrec.methods import Task

NEEDED = ("original_text", "rewritten_text")
PART_FIELDS = ("rewrite_prompt", "method", "texts", "run")  # of a row in a process's own file
CURRENT = "(current)"  # a recoverer's adapter: the weights as they are, in the middle of training
Shot = tuple[str, str, str]  # a solved example: original, rewritten, prompt
LONGEST_ANSWER = 60  # words; a longer answer is a model that goes on talking
_OPENING = re.compile(
    r"^(?:the |this )?(?:rewrite |original )?(?:prompt|instruction|answer)(?: was| is)?\s*[:\-]\s*", re.IGNORECASE
)
_MARKS = re.compile(r"<[^<>\s]{1,24}>|\*\*|^#+\s*", re.MULTILINE)


def answer_column(method: str) -> str:
    """The column of a table that holds another method's answers."""
    return f"answer:{method}"


class Recoverer(Protocol):
    """What every approach offers: a `name` for tables, and `recover`."""

    name: str

    def recover(self, table: pd.DataFrame) -> list[str]:
        """One prompt for each row of a table with original_text and rewritten_text."""


def normalise(answer: str, fallback: str = FALLBACK) -> str:
    """A model's raw answer as one clean line: lead-in, marks, labels and quotes off, first paragraph, at most 60 words.

    An answer with nothing left becomes `fallback`: a blank row would void a submission.
    """
    text = _MARKS.sub("", strip_lead_in(answer)).strip()
    text = _OPENING.sub("", text).split("\n\n")[0]
    text = " ".join(text.split()[:LONGEST_ANSWER]).strip(" \"'`")
    return text if any(character.isalpha() for character in text) else fallback


@dataclass(frozen=True)
class Constant:
    """The same answer whatever the texts: the floor of every comparison."""

    prompt: str = FALLBACK
    name: str = "constant"

    def recover(self, table: pd.DataFrame) -> list[str]:
        return [self.prompt] * len(table)


def best_constant(prompts: Sequence[str], scorer: Scorer, candidates: Sequence[str] = ()) -> str:
    """The candidate (by default: a training prompt) with the highest mean SCS to all training prompts.

    Exact over the pairs: embeddings [n, d] and [m, d] give an [m, n] table of cosines; mean of its cube by row.
    """
    if not len(prompts):
        raise InputError("no training prompts to choose a constant from")
    candidates = sorted(set(candidates or prompts))
    targets, options = scorer.encode(list(prompts)), scorer.encode(candidates)
    blocks = (options[start : start + 512] for start in range(0, len(options), 512))
    return candidates[int(np.concatenate([((block @ targets.T) ** 3).mean(1) for block in blocks]).argmax())]


def build_constant(task: Task) -> Constant:
    """The best-known constant, whatever the task."""
    return Constant()


def build_best_constant(task: Task) -> Constant:
    """The training prompt that scores best as the answer to every training triple."""
    return Constant(best_constant(task.train["rewrite_prompt"].tolist(), task.scorer), name="best constant")


@dataclass
class LanguageModelRecoverer:
    """A causal LM asked for the prompt: zero-shot, with `shots` solved examples, or with a LoRA adapter active.

    `shots` are (original, rewritten, prompt), the same for all rows, or a function of the table: some for each row.
    `adapter` is a key of the model's adapters, None to switch them off, or CURRENT for the model as it is.
    """

    model: object
    tokenizer: object
    name: str
    adapter: str | None = None
    shots: Sequence[Shot] | Callable[[pd.DataFrame], Sequence[Sequence[Shot]]] = ()
    chat: str = "gemma"
    settings: object = None
    longest_text: int = 300  # words of each text that the model gets to see
    log: Path | None = field(default=None)  # answers are appended here as they come, and found again after a restart
    stop_after: float | None = None

    def recover(self, table: pd.DataFrame) -> list[str]:
        check_pairs(table)
        done = self._read_log()
        ids = table["id"].astype(str).tolist() if "id" in table else [str(row) for row in range(len(table))]
        todo = [row for row, identifier in enumerate(ids) if identifier not in done]
        if todo:
            requests = self._requests(table.iloc[todo])
            answers = self._answer(requests, [ids[row] for row in todo])
            done |= {ids[row]: answer for row, answer in zip(todo, answers, strict=True)}
        return [normalise(done[identifier]) for identifier in ids]

    def _requests(self, table: pd.DataFrame) -> list[str]:
        from promptrec.data import slice_texts
        from promptrec.templates import recovery_request

        cut = slice_texts(table, self.longest_text)
        solved = self.shots(table) if callable(self.shots) else [self.shots] * len(table)
        rows = zip(cut["original_text"], cut["rewritten_text"], solved, strict=True)
        return [recovery_request(original, rewritten, self.chat, shots) for original, rewritten, shots in rows]

    def _answer(self, requests: list[str], ids: list[str]) -> list[str]:
        def keep(positions, texts):
            if self.log:
                append_jsonl(
                    self.log, [{"id": ids[p], "answer": text} for p, text in zip(positions, texts, strict=True)]
                )

        return self._generate(requests, keep)

    def _generate(self, requests: list[str], keep: Callable[[list[int], list[str]], None]) -> list[str]:
        """Raw answers, in order; `keep(positions, answers)` is called as batches finish. Another engine overrides this."""
        from promptrec.language_model import GenerationSettings, generate
        from promptrec.templates import chat_of

        with self._active():
            return generate(
                self.model,
                self.tokenizer,
                requests,
                self.settings or GenerationSettings(),
                stop=chat_of(self.chat).after_model,
                description=self.name,
                on_batch=keep,
                stop_after=self.stop_after,
            )

    def _active(self):
        """The model with this recoverer's adapter switched on, or with all adapters off."""
        from contextlib import nullcontext

        if self.adapter == CURRENT or not hasattr(self.model, "disable_adapter"):
            return nullcontext()
        if self.adapter is None:
            return self.model.disable_adapter()
        self.model.set_adapter(self.adapter)
        return nullcontext()

    def _read_log(self) -> dict[str, str]:
        if self.log is None or not Path(self.log).is_file():
            return {}
        return {row["id"]: row["answer"] for row in read_jsonl(self.log, tolerate_torn_tail=True)}


def check_pairs(table: pd.DataFrame, where: str = "the table") -> pd.DataFrame:
    """Raise InputError unless every row has an original and a rewritten text (and distinct ids, where there are ids)."""
    require_columns(table, NEEDED, where)
    if table.empty:
        raise InputError(f"{where}: there are no rows to answer")
    check_cells(table, NEEDED, where)
    return table


def pick_shots(train: pd.DataFrame, count: int, seed: int = 0, longest: int = 60) -> list[Shot]:
    """Solved examples for few-shot prompting: short training triples of distinct prompt clusters, drawn at random."""
    short = train[
        (train["original_text"].str.split().str.len() <= longest)
        & (train["rewritten_text"].str.split().str.len() <= longest)
    ]
    if short["prompt_cluster"].nunique() < count:
        raise InputError(
            f"only {short['prompt_cluster'].nunique()} short training triples of distinct prompts; {count} shots asked for"
        )
    drawn = short.sample(frac=1, random_state=seed).drop_duplicates("prompt_cluster").head(count)
    return list(drawn[["original_text", "rewritten_text", "rewrite_prompt"]].itertuples(index=False, name=None))


def predict_all(recoverers: Sequence[Recoverer], table: pd.DataFrame) -> pd.DataFrame:
    """Predictions of several recoverers, one below the other: id, rewrite_prompt, method."""
    parts = [
        pd.DataFrame({"id": table["id"], "rewrite_prompt": one.recover(table), "method": one.name})
        for one in recoverers
    ]
    return pd.concat(parts, ignore_index=True)


def predict_shared(
    recoverer: Recoverer, table: pd.DataFrame, out: str | Path, run: str, rows: int = 256
) -> pd.DataFrame:
    """predict_all of one recoverer by all processes of this run, which each answer their share.

    Every `rows` answers are appended to a file beside `out`; found there after a kill, also by fewer processes, they are
    not asked again. `run` says what else an answer depends on (method, seed, adapter); answers of another run are refused
    (InputError). Every process gets all predictions, in the order of `table`.
    """
    columns = [*NEEDED, *(["prediction"] if "prediction" in table else [])]  # what an answer depends on
    texts = [text_id(*map(str, row)) for row in table[columns].itertuples(index=False)]
    expected = {row: {"texts": text, "run": run} for row, text in zip(table["id"], texts, strict=True)}
    done = read_finished(part_files(out), expected, PART_FIELDS, ("recovery", "answered"))
    todo = share(table)
    todo = todo[~todo["id"].isin(done)]
    for start in progress(range(0, len(todo), rows), desc=f"recover ({recoverer.name})", unit=f" x {rows} rows"):
        answered = predict_all([recoverer], todo.iloc[start : start + rows]).to_dict("records")
        answered = [row | expected[row["id"]] for row in answered]
        append_jsonl(own_part(out), answered)
        done |= {row["id"]: row for row in answered}
    done = {row["id"]: row for row in gather(list(done.values()))}
    return pd.DataFrame([done[row] for row in table["id"]])[["id", "rewrite_prompt", "method"]]


def held_out_scs(
    validation: pd.DataFrame,
    scorer: Scorer,
    chat: str = "gemma",
    settings: object = None,
    recoverer: type[LanguageModelRecoverer] = LanguageModelRecoverer,
) -> Callable[[object, object], float]:
    """function(model, tokenizer) -> mean SCS of greedy answers on the validation rows: what picks the best checkpoint.

    Several processes answer a share of the rows each and all get the mean over all rows: none waits for the first one
    to answer them all, and all keep the same checkpoint.
    """
    rows = share(validation)
    truth = scorer.encode(rows["rewrite_prompt"].tolist())

    def measure(model, tokenizer) -> float:
        asked = recoverer(model, tokenizer, "validation", adapter=CURRENT, chat=chat, settings=settings)
        answers = asked.recover(rows.drop(columns="rewrite_prompt")) if len(rows) else []
        return float(np.mean(gather(scs(scorer.encode(answers), truth).tolist())))

    return measure
