"""The comparison: every method on one split under one scorer, several seeds each, one process a trial.

A trial (one method, one seed) ends in a file of its own: a comparison that was stopped goes on where it was, one more
method is added without asking the others again, and a method that fails takes no other with it. Nothing but the two
texts of a test row reaches a method.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from promptrec.cache import digest, packed, read_arrays, save_arrays, unpacked
from promptrec.data import TEXT_COLUMNS
from promptrec.errors import InputError
from promptrec.findings import BASELINE, contrasts, headroom, results, row_scores, sayings, seed_scores
from promptrec.finetuning import split_triples
from promptrec.inference import answer_column
from promptrec.methods import METHODS, Task, check_method, methods_of, shipped_wordings_of
from promptrec.profiles import Profile
from promptrec.scoring import profile_scorer
from promptrec.tables import claim, progress, read_json, read_table, versions, write_json, write_table

RSS_A_MIB = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss counts bytes on a Mac, KiB elsewhere


@dataclass(frozen=True)
class CompareSettings:
    """How much is asked."""

    rows: int = 200  # test rows, shared out evenly among the sources of the triples
    validation_rows: int = 100  # for methods that choose by held-out rows
    seeds: int = 3  # of a method that is trained or sampled
    jobs: int = 0  # processes at a time; 0: one for each core, or one where there is an accelerator
    seed: int = 0  # of which rows are drawn


@dataclass(frozen=True)
class Trial:
    """One method with one seed, and the file that its result goes to."""

    folder: Path
    method: str
    seed: int

    @property
    def path(self) -> Path:
        """Where the result goes."""
        return self.folder / "trials" / f"{self.method}-{self.seed}.json"

    def result(self) -> dict:
        """The finished result. Raises InputError where there is none."""
        if not self.path.is_file():
            raise InputError(f"{self.method}, seed {self.seed}: no result; it failed or was not run")
        return read_json(self.path)


# --- the data


def prepare(path: str | Path, folder: Path, profile: Profile, settings: CompareSettings) -> pd.DataFrame:
    """The rows of a comparison, written to `folder` with what it is about; found there again when it goes on.

    A file with `split` and `prompt_cluster` (as Part 1 writes it) keeps its split; others are split here. Raises
    InputError where `folder` holds a comparison of other rows or by another scorer.
    """
    table = split_triples(path)
    if "source" not in table:
        table = table.assign(source="triples")
    sides = {"validation": settings.validation_rows, "test": settings.rows}
    drawn = [_evenly(table[table["split"] == side], count, settings.seed) for side, count in sides.items()]
    rows = pd.concat([table[table["split"] == "train"], *drawn], ignore_index=True)
    for side in ("train", *sides):
        if not (rows["split"] == side).any():
            raise InputError(f"{path}: no {side} rows; a comparison needs train, validation and test rows")
    about = {
        "rows": digest(*rows[["id", *TEXT_COLUMNS, "split"]].to_numpy().ravel()),
        "profile": profile.name,
        "scorer": profile_scorer(profile).name,
    }
    claim(folder / "about.json", about, "a comparison of")
    write_json(shipped_wordings_of(rows.loc[rows["split"] != "train", "rewrite_prompt"]), folder / "avoid.json")
    _keep_vectors(folder, rows, profile)
    write_table(rows, folder / "rows.csv")
    return rows


def _evenly(table: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Up to `count` rows, as many of each source."""
    sources = table.groupby("source")
    share = max(1, count // max(1, sources.ngroups))
    return pd.concat([part.sample(min(share, len(part)), random_state=seed) for _, part in sources] or [table])


def _keep_vectors(folder: Path, rows: pd.DataFrame, profile: Profile) -> None:
    """Embed every prompt that may be answered with once, not once in each process."""
    if read_arrays(folder / "vectors.npz"):
        return
    task = Task(profile, rows[rows["split"] == "train"], rows, folder)
    texts = sorted({*task.bank, *rows["rewrite_prompt"]})
    vectors = task.scorer.encode(texts, show_progress=True)
    save_arrays(folder / "vectors.npz", texts=packed(texts), vectors=vectors)


# --- one trial, in a process of its own


class Clock:
    """Seconds since the last lap, by the clock on the wall and by the processor's (which what runs beside cannot slow)."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def lap(self) -> dict[str, float]:
        """{"seconds", "cpu_seconds"} since the last call."""
        now = time.perf_counter(), time.process_time()
        passed = [round(after - before, 2) for before, after in zip(self.started, now, strict=True)]
        self.started = now
        return dict(zip(("seconds", "cpu_seconds"), passed, strict=True))


def run_trial(trial: Trial, profile: Profile) -> dict:
    """Fit the method, let it answer the validation and test rows, score the answers, write the result."""
    rows = read_table(trial.folder / "rows.csv")
    if known := read_arrays(trial.folder / "vectors.npz"):
        profile_scorer(profile).remember(unpacked(known["texts"]), known["vectors"])
    train, held = rows[rows["split"] == "train"], rows[rows["split"] != "train"]
    held = _with_answers(held.reset_index(drop=True), trial)
    validation = held[held["split"] == "validation"].reset_index(drop=True)
    avoid = frozenset(read_json(trial.folder / "avoid.json"))
    task = Task(profile, train.reset_index(drop=True), validation, adapter_of(trial), trial.seed, avoid)
    clock = Clock()
    if trial.method == "fine-tuned":  # others of this seed start from its adapter
        from promptrec.causal_lm import train_adapter

        train_adapter(task, task.adapter)
    recoverer = METHODS[trial.method].build(task)
    fitted = clock.lap()
    held = held.assign(answer=recoverer.recover(held.drop(columns=["rewrite_prompt", "prompt_cluster", "split"])))
    answered = clock.lap()
    held["scs"] = task.scorer.scs(held["answer"].tolist(), held["rewrite_prompt"].tolist())
    result = {
        "method": trial.method,
        "seed": trial.seed,
        **{f"fit_{name}": value for name, value in fitted.items()},
        **{f"answer_{name}": value for name, value in answered.items()},
        "rows": len(held),
        "memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / RSS_A_MIB),
        "history": getattr(recoverer, "history", []),
        "answers": held[["id", "split", "answer", "scs"]].to_dict("records"),
    }
    write_json(result, trial.path)
    return result


def _with_answers(held: pd.DataFrame, trial: Trial) -> pd.DataFrame:
    """The held-out rows with the answers of the methods that this one works on."""
    for need in METHODS[trial.method].needs:
        answers = {row["id"]: row["answer"] for row in trial_of(trial.folder, need, trial.seed).result()["answers"]}
        held = held.assign(**{answer_column(need): held["id"].map(answers)})
    return held


def trial_of(folder: Path, method: str, seed: int) -> Trial:
    """The trial of a method for a seed; one that is not random has seed 0 only."""
    return Trial(folder, method, seed if METHODS[method].random else 0)


def adapter_of(trial: Trial) -> Path:
    """The fine-tuned adapter that this trial starts from: its own seed's."""
    return trial.folder / "adapters" / str(trial.seed)


# --- all of them


def before(method: str) -> set[str]:
    """The methods that must have answered before this one: all that it works on, and what those work on."""
    direct = {*METHODS[method].needs, *(["fine-tuned"] if METHODS[method].adapted else [])} - {method}
    return direct.union(*map(before, direct))


def in_waves(methods: Iterable[str]) -> list[list[str]]:
    """The methods and all that they need, in waves: each wave needs the ones before it only."""
    wanted = {one for method in methods for one in (method, *before(method))}
    depths = {method: _depth(method) for method in METHODS if method in wanted}
    return [[method for method in depths if depths[method] == depth] for depth in range(max(depths.values()) + 1)]


def _depth(method: str) -> int:
    return max((1 + _depth(one) for one in before(method)), default=0)


def run_comparison(
    path: str | Path,
    folder: Path,
    profile: Profile,
    methods: Sequence[str] = (),
    settings: CompareSettings | None = None,
) -> pd.DataFrame:
    """Run all trials that have no result yet and write <folder>/results.json; returns its rows as a table.

    A method that fails is told on stderr, with its own last line, and in the results; the others go on. Stopped by hand,
    it writes the results of the trials that are finished.
    """
    settings, folder = settings or CompareSettings(), Path(folder).resolve()
    methods = list(methods or methods_of(profile))
    for method in [BASELINE, *methods]:
        check_method(method, profile)
    rows = prepare(path, folder, profile, settings)
    waves = [_trials(folder, wave, settings.seeds) for wave in in_waves([BASELINE, *methods])]
    trials = [trial for wave in waves for trial in wave]
    try:
        _run(waves, profile, settings.jobs or _jobs(profile))
    except KeyboardInterrupt:
        with suppress(InputError):  # not even the baseline is finished
            write_results(folder, rows, trials, profile, settings)
        raise
    return write_results(folder, rows, trials, profile, settings)


def _jobs(profile: Profile) -> int:
    """A process for each core, or one at a time where they would share an accelerator."""
    return (os.cpu_count() or 1) if profile.name == "local" else 1


def _trials(folder: Path, methods: Sequence[str], seeds: int) -> list[Trial]:
    return list(dict.fromkeys(trial_of(folder, one, seed) for seed in range(seeds) for one in methods))


def _run(waves: Sequence[Sequence[Trial]], profile: Profile, jobs: int) -> None:
    """Run the trials, `jobs` at a time, each wave after the one before it."""
    run, pool = partial(_in_process, profile=profile.name, alone=jobs == 1), ThreadPoolExecutor(jobs)
    try:
        with progress(None, total=sum(map(len, waves)), desc="trials") as bar:
            for wave in waves:
                for _ in pool.map(run, wave):
                    bar.update()
    finally:
        pool.shutdown(cancel_futures=True)


def _in_process(trial: Trial, profile: str, alone: bool) -> None:
    """Run a trial that has no result in a process of its own; several at a time get one thread each."""
    if trial.path.is_file():
        return
    environment = os.environ | ({} if alone else {"OMP_NUM_THREADS": "1"})
    command = [sys.executable, "-m", "promptrec", "trial", str(trial.folder), trial.method]
    done = subprocess.run(
        [*command, "--seed", str(trial.seed), "--profile", profile],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    failed = trial.path.with_suffix(".failed")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        failed.parent.mkdir(parents=True, exist_ok=True)
        failed.write_text(done.stderr or reason)
        print(f"{trial.method}, seed {trial.seed}: {reason}", file=sys.stderr)
    else:
        failed.unlink(missing_ok=True)


# --- what came out


def write_results(
    folder: Path,
    rows: pd.DataFrame,
    trials: Sequence[Trial],
    profile: Profile,
    settings: CompareSettings,
) -> pd.DataFrame:
    """<folder>/results.json from the finished trials: the table, claims, learning curves, and what is missing."""
    finished = [trial.result() for trial in trials if trial.path.is_file()]
    by_seed, scorer = seed_scores(rows, finished), profile_scorer(profile)
    scores = row_scores(by_seed)
    table = results(scores, finished).merge(sayings(rows, finished, scorer), on=["source", "method"])
    about = {
        "scorer": scorer.name,
        "profile": profile.name,
        "settings": asdict(settings),
        "cpu_seconds": round(sum(one["fit_cpu_seconds"] + one["answer_cpu_seconds"] for one in finished)),
        "versions": versions(),
        "missing": [f"{trial.method}, seed {trial.seed}" for trial in trials if not trial.path.is_file()],
    }
    curves = {f"{one['method']}, seed {one['seed']}": one["history"] for one in finished if one["history"]}
    found = {"rows": table.to_dict("records"), "claims": contrasts(scores), "headroom": headroom(by_seed)}
    write_json(about | found | {"histories": curves}, folder / "results.json")
    return table
