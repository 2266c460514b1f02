"""python rehearse.py PROFILE INPUTS WORKING: the series as on Kaggle, each part a session of its own.

Every part has an empty working folder; what it left is attached to the next ones below INPUTS. Prints the seconds.
Under kaggle-tpu Part 1 is the notebook, Parts 2 and 3 are their headless form: fine-tune, answer, score, submit.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd

from promptrec.profiles import Profile, activate, find_result, get_profile
from promptrec.series import PARTS, execute_notebook, notebooks_folder
from promptrec.tables import read_table, write_table


def notebook(part: str, profile: Profile, working: Path) -> None:
    execute_notebook(notebooks_folder() / f"{part}.py", working / f"{part}.ipynb", profile, working / part)


def short_rows(profile: Profile) -> pd.DataFrame:
    """The eight shortest rows of each split: eight virtual devices on two cores are slow, and every length is compiled."""
    table = read_table(find_result(profile, "training_data.csv"))
    lengths = table["original_text"].str.len() + table["rewritten_text"].str.len()
    return table.iloc[lengths.argsort(kind="stable")].groupby("split").head(8)


def fine_tune(part: str, profile: Profile, working: Path) -> None:
    from promptrec.finetuning import finetune_file

    rows = write_table(short_rows(profile), working / "short.csv")
    finetune_file(rows, working / part / "adapter", profile)


def evaluate(part: str, profile: Profile, working: Path) -> None:
    from promptrec.inference import Constant, predict_all
    from promptrec.methods import make_recoverer
    from promptrec.scoring import profile_scorer, score_predictions
    from promptrec.submission import fill_blanks, read_test, write_submission

    tuned = make_recoverer("fine-tuned", profile, adapter=find_result(profile, "adapter"))
    held_out = short_rows(profile).query("split == 'test'")
    parts = [
        score_predictions(predict_all([one], held_out), held_out, profile_scorer(profile)).assign(method=one.name)
        for one in (Constant(), tuned)
    ]
    for scored in parts:
        write_table(scored[["id", "method", "scs"]], working / part / f"scores-{scored['method'].iloc[0]}.csv")
    test = read_test(profile)
    whole = test.dropna()
    answered = whole[["id"]].assign(rewrite_prompt=tuned.recover(whole))
    filled = fill_blanks(test[["id"]].merge(answered, on="id", how="left"))
    write_submission(filled, working / part / "submission.csv", ids=test["id"])


def rehearse(name: str, inputs: Path, working: Path) -> None:
    _, tune, judge = PARTS
    steps: dict[str, Callable] = dict.fromkeys(PARTS, notebook)
    if name == "kaggle-tpu":
        steps |= {tune: fine_tune, judge: evaluate}
    seconds = {}
    for part, run in steps.items():
        started = time.monotonic()
        run(part, activate(replace(get_profile(name), out=str(working / part))), working)
        shutil.copytree(working / part, inputs / f"promptrec-{part}")
        seconds[part] = round(time.monotonic() - started, 1)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    rehearse(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
