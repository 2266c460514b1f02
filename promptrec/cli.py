"""The command line: a thin face over the package. Exit code 0: done; 2: the input is wrong, with one line saying what."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from promptrec.errors import InputError
from promptrec.profiles import activate, get_profile, missing_inputs, override, unused_settings

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Recover the prompt that made a language model rewrite a text.",
)
Input = Annotated[Path, typer.Argument(help="CSV, JSONL or Parquet")]
ProfileName = Annotated[
    str | None, typer.Option("--profile", help="local, gpu, kaggle-t4x2 or kaggle-tpu; default: detected")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="seed of everything random")]
ScorerName = Annotated[str | None, typer.Option("--scorer", help="minilm, t5-tf or t5-hf; default: the profile's")]
ScorerModel = Annotated[str, typer.Option(help="model directory of a t5 scorer")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command()
def doctor(profile: ProfileName = None) -> None:
    """Profile, devices, versions, what is attached and what is missing."""
    from promptrec.doctor import report

    chosen = get_profile(profile)
    print(report(chosen))
    if missing := missing_inputs(chosen):
        raise InputError(f"{len(missing)} input(s) missing: {'; '.join(missing)}")


@app.command()
def series(
    profile: ProfileName = None,
    out: Annotated[Path | None, typer.Option(help="where results go")] = None,
    part: Annotated[list[str] | None, typer.Option(help="only this part; may be repeated")] = None,
) -> None:
    """Run the three notebooks in order and print the comparison table."""
    from promptrec.series import run_series, summary

    chosen = _activated(profile, out)
    seconds = run_series(chosen, part or ())
    if not part:
        print("\n" + summary(chosen))
    print("seconds: " + ", ".join(f"{part} {value:.0f}" for part, value in seconds.items()))


@app.command()
def rewrite(
    table: Input,
    out: Annotated[Path, typer.Option(help="JSONL log, appended; the same call resumes")],
    profile: ProfileName = None,
    batch_size: Annotated[int, typer.Option(min=1, help="texts at a time")] = 64,
    shard: Annotated[str | None, typer.Option(help="INDEX/COUNT, for runs started apart; not with torchrun")] = None,
    seed: Seed = 0,
) -> None:
    """Rewrite every row (original_text, rewrite_prompt): batched, appended, resumable."""
    from promptrec.data import text_id
    from promptrec.distributed import first
    from promptrec.rewriting import get_rewriter, rewrite_table
    from promptrec.tables import read_table

    part, chosen = _shard(shard), _together(profile)
    rows = read_table(table, required=["original_text", "rewrite_prompt"])
    if "id" not in rows:
        rows["id"] = [
            text_id(str(a), str(b)) for a, b in zip(rows["original_text"], rows["rewrite_prompt"], strict=True)
        ]
    _ending(out, ".jsonl")
    _apart(out, table)
    finished = rewrite_table(rows, get_rewriter(chosen, seed), out, batch_size, part)
    if first():
        print(f"{len(finished)} of {len(rows)} rows are rewritten in {out}{_by_several()}")


@app.command()
def finetune(
    table: Input,
    out: Annotated[Path, typer.Option(help="folder of the adapter; the same call resumes")],
    profile: ProfileName = None,
    steps: Annotated[int, typer.Option(min=0, help="0: as the profile says")] = 0,
    seed: Seed = 0,
) -> None:
    """Fine-tune a LoRA adapter on triples; held-out prompt clusters pick the checkpoint."""
    from promptrec.distributed import first
    from promptrec.finetuning import finetune_file

    chosen = _together(profile)
    history = finetune_file(table, out, chosen, seed=seed, **({"steps": steps} if steps else {}))
    scored = history["scs"].notna().any()
    best = (
        f"held-out SCS {history['scs'].max():.3f} ({chosen.scorer})"
        if scored
        else f"loss {history['eval_loss'].min():.3f}"
    )
    if first():
        print(f"adapter in {out}; best {best} after {int(history['step'].max())} steps{_by_several()}")


@app.command()
def recover(
    table: Input,
    out: Annotated[Path, typer.Option(help="predictions: id, rewrite_prompt, method")],
    method: Annotated[str | None, typer.Option(help="default: the best the profile can run")] = None,
    train: Annotated[list[Path] | None, typer.Option(help="more training triples; may be repeated")] = None,
    adapter: Annotated[Path | None, typer.Option(help="adapter folder of method fine-tuned")] = None,
    profile: ProfileName = None,
    seed: Seed = 0,
) -> None:
    """Recover the prompt of each row (original_text, rewritten_text)."""
    from promptrec.distributed import first, processes, remove_parts
    from promptrec.inference import check_pairs, predict_shared
    from promptrec.methods import default_method, make_recoverer, run_of
    from promptrec.tables import read_table, write_manifest, write_table

    chosen, started = _together(profile), time.time()
    _ending(out, ".csv", ".jsonl", ".parquet")
    _apart(out, table, *train or ())
    rows = check_pairs(read_table(table), str(table))
    if "id" not in rows:
        rows["id"] = [str(number) for number in range(len(rows))]
    name = method or default_method(chosen)
    recoverer = make_recoverer(name, chosen, train or (), adapter, seed)
    predictions = predict_shared(recoverer, rows, out, run_of(name, chosen, train or (), adapter, seed))
    if not first():
        return
    write_table(predictions, out)
    remove_parts(out)
    facts, told = {"rows": len(predictions), "method": name, **processes()}, ""
    if hasattr(recoverer, "expected_scs"):
        facts["expected_scs"] = float(recoverer.expected_scs(rows, predictions["rewrite_prompt"]).mean())
        told = f", expected mean SCS {facts['expected_scs']:.3f} under {recoverer.scorer.name}"
    facts |= {"train": [path.name for path in train]} if train else {}
    facts |= {"adapter": adapter.name} if adapter else {}
    facts |= {name: getattr(recoverer, name) for name in ("settings", "decoding") if hasattr(recoverer, name)}
    write_manifest(out, started=started, profile=chosen.name, seed=seed, **facts)
    print(
        f"{len(predictions)} prompts recovered by {name} in {out}{told} ({time.time() - started:.0f} s){_by_several()}"
    )


@app.command()
def score(
    predictions: Input,
    truth: Input,
    scorer: ScorerName = None,
    scorer_model: ScorerModel = "",
    as_json: AsJson = False,
    profile: ProfileName = None,
) -> None:
    """Mean SCS of predictions (id, rewrite_prompt) against the truth (id, rewrite_prompt), with a bootstrap interval."""
    from promptrec.comparison import interval
    from promptrec.scoring import check_predictions, score_predictions
    from promptrec.tables import read_table

    chosen = _activated(profile)
    needed = ["id", "rewrite_prompt"]
    tables = read_table(predictions, needed), read_table(truth, needed)
    check_predictions(*tables)  # before the scorer is loaded
    judge = _judge(chosen, scorer, scorer_model)
    scored = score_predictions(*tables, judge)
    mean, low, high = interval(scored["scs"].to_numpy(), scored.get("prompt_cluster", scored["rewrite_prompt"]))
    result = {"mean_scs": mean, "low": low, "high": high, "n": len(scored), "scorer": judge.name}
    print(
        json.dumps(result)
        if as_json
        else f"mean SCS {mean:.4f} [{low:.4f}, {high:.4f}]  n={len(scored)}  scorer: {judge.name}"
    )


@app.command()
def compare(
    table: Annotated[Path, typer.Argument(help="triples; Part 1's training_data.csv, or CSV, JSONL, Parquet")],
    out: Annotated[Path, typer.Option(help="folder of the results; the same call goes on")],
    methods: Annotated[str, typer.Option(help="names, separated by commas; default: all the profile can run")] = "",
    rows: Annotated[int, typer.Option(min=1, help="test rows")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="of each method that is trained or sampled")] = 3,
    jobs: Annotated[
        int, typer.Option(min=0, help="processes at a time; 0: one a core, or one with an accelerator")
    ] = 0,
    profile: ProfileName = None,
) -> None:
    """Compare methods on one split under one scorer: each with each seed in a process of its own, resumable."""
    from promptrec.findings import summary
    from promptrec.profiles import override
    from promptrec.trials import CompareSettings, run_comparison

    chosen = _activated(profile)
    if out.is_file():
        raise InputError(f"--out {out}: is a file; name a folder")
    _apart(out / "rows.csv", table)
    settings = override(CompareSettings(), rows=rows, seeds=seeds, jobs=jobs)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    print(summary(run_comparison(table, out, chosen, names, settings)))
    print(f"table, claims and learning curves: {out / 'results.json'}")


@app.command(hidden=True)
def trial(folder: Path, method: str, seed: Seed = 0, profile: ProfileName = None) -> None:
    """One method with one seed: what compare starts."""
    from promptrec.trials import Trial, run_trial

    run_trial(Trial(folder, method, seed), _activated(profile))


@app.command("mean-prompt")
def mean_prompt(
    prompts: Annotated[Path, typer.Argument(help="TXT, one prompt a line; or CSV, JSONL, Parquet with rewrite_prompt")],
    out: Annotated[Path, typer.Option(help="TXT that the string goes to")],
    max_tokens: Annotated[int, typer.Option(help="of the string, special tokens included")] = 128,
    evaluations: Annotated[int, typer.Option(help="strings to encode")] = 16000,
    seconds: Annotated[float, typer.Option(help="after which the search ends all the same; 0: no limit")] = 480,
    level: Annotated[str, typer.Option(help="word (stays readable) or token")] = "word",
    probes: Annotated[Path | None, typer.Option(help="table: rewrite_prompt, score (on the leaderboard)")] = None,
    scorer: ScorerName = None,
    scorer_model: ScorerModel = "",
    as_json: AsJson = False,
    profile: ProfileName = None,
    seed: Seed = 0,
) -> None:
    """Search for the one string that scores best as the answer to every row; half of the prompts judge it."""
    from promptrec.mean_prompt import mean_prompt_file, summary
    from promptrec.token_search import SearchSettings

    chosen = _activated(profile)
    _ending(out, ".txt")
    _apart(out, prompts, *[probes] if probes else [])
    settings = override(
        SearchSettings(), level=level, max_tokens=max_tokens, evaluations=evaluations, seconds=seconds, seed=seed
    )
    found = mean_prompt_file(prompts, out, _judge(chosen, scorer, scorer_model), settings, chosen.name, probes)
    print(json.dumps(found) if as_json else summary(found))


def _judge(chosen, name: str | None, model: str):
    """The scorer asked for, or the profile's; the profile's model serves where it is the same scorer."""
    from promptrec.scoring import get_scorer

    name = name or chosen.scorer
    return get_scorer(name, model or (chosen.scorer_model if name == chosen.scorer else ""))


def _apart(out: Path, *read: Path) -> None:
    """Refuse to write over a file that is read."""
    if any(out.resolve() == path.resolve() for path in read):
        raise InputError(f"--out {out}: is a file that is read; name another")


def _activated(name: str | None, out: Path | None = None):
    if out is not None:
        os.environ["PROMPTREC_OUT"] = str(out)
    return activate(get_profile(name))


def _together(name: str | None):
    """The profile, activated, in the group of processes that a launcher started; one process has no group."""
    from promptrec.distributed import join, world

    chosen = _activated(name)
    if chosen.in_keras and world() > 1:
        raise InputError(f"profile {chosen.name}: one process drives all devices in Keras; start without torchrun")
    join()
    return chosen


def _by_several() -> str:
    from promptrec.distributed import world

    return f" by {world()} processes" if world() > 1 else ""


def _ending(path: Path, *endings: str) -> None:
    if path.suffix not in endings:
        raise InputError(f"--out {path}: name a file ending in {' or '.join(endings)}")
    if path.is_dir():
        raise InputError(f"--out {path}: is a folder; name a file")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(f"--out {path}: nothing can be written to {there}; choose another place")


def _shard(text: str | None) -> tuple[int, int] | None:
    from promptrec.distributed import world

    if text is None:
        return None
    if world() > 1:
        raise InputError("--shard is for runs started apart; the processes of torchrun share the rows by themselves")
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise InputError(f"--shard {text!r}: write INDEX/COUNT with INDEX below COUNT, such as 0/4")
    return int(index), int(count)


USAGE_ERROR = typer.BadParameter.__base__  # click's own, of which typer carries a copy
OUTPUT_TROUBLE = ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "EISDIR", "ENOTDIR", "EEXIST", "ENAMETOOLONG")


def main() -> None:
    """Entry point: wrong input becomes one line and exit code 2, never a traceback."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        _leave_group()
        _name_unused_settings()
    except InputError as error:
        _leave(str(error))
    except USAGE_ERROR as error:
        _leave(f"{error.format_message().rstrip('.')}; see promptrec --help")
    except OSError as error:
        if errno.errorcode.get(error.errno) not in OUTPUT_TROUBLE:
            raise
        _leave(f"{error.filename or 'output'}: {error.strerror}; choose another place or free space")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        _leave(
            "stopped; what rewrite, recover, finetune or compare had finished is kept: the same command goes on", 130
        )


def _name_unused_settings() -> None:
    """A misspelt setting would be silently ignored. (`series` and `compare` hand theirs on to other processes.)"""
    alone = {"rewrite", "finetune", "recover", "mean-prompt"} & set(sys.argv[1:2])
    if alone and (unused := unused_settings()):
        print(f"promptrec: PROMPTREC_SETTINGS: nothing here has a setting {', '.join(unused)}", file=sys.stderr)


def _leave_group() -> None:
    if (distributed := sys.modules.get("promptrec.distributed")) is not None:
        distributed.leave()


def _leave(message: str, code: int = 2) -> NoReturn:
    """One line on stderr, no traceback."""
    print(f"promptrec: {' '.join(message.splitlines())}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
