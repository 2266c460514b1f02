"""(original, prompt) -> rewritten: batched, appended to disk, resumable.

The log is JSONL with one finished row a line: triples, ready to train on. Killed at any moment and started again, the run
loses at most the batch in flight, repeats nothing and ends with the same set of rows. Several processes share the work:
those of one launcher by themselves (distributed.py), runs started apart by `shard`.
"""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd

from promptrec.data import check_cells
from promptrec.distributed import merge_logs, own_file, part_files, read_finished, share, world
from promptrec.profiles import Profile, override
from promptrec.rewriters import Rewriter
from promptrec.tables import append_jsonl, full_disk_named, progress, require_columns


def rewrite_table(
    table: pd.DataFrame,
    rewriter: Rewriter,
    log: str | Path,
    batch_size: int = 64,
    shard: tuple[int, int] | None = None,
    stop_after: float | None = None,
) -> pd.DataFrame:
    """Rewrite every row of `table` (id, original_text, rewrite_prompt) and return it with rewritten_text and source.

    Rows already in `log` are not done again. `shard` = (index, count) takes that share of the rows, by default the
    one of this process; `stop_after` seconds ends early (the rest is done by the next call). Rows come back in the
    order of `table`, those of all processes in each.
    Raises InputError for bad cells, for a log that belongs to other rows and for a full disk.
    """
    require_columns(table, ["id", "original_text", "rewrite_prompt"], "rewriting")
    check_cells(table, ["original_text", "rewrite_prompt"], "rewriting")
    log = Path(log)
    done = _finished(log, table, rewriter)
    todo = share(table, *shard or ())
    todo = todo[~todo["id"].isin(done)]
    if hasattr(rewriter, "check"):
        rewriter.check(todo["rewrite_prompt"])
    longest_first = todo["original_text"].map(len).to_numpy().argsort(kind="stable")[::-1]
    todo = todo.iloc[longest_first]  # so that running out of memory shows at once
    bar = progress(range(0, len(todo), batch_size), desc=f"rewrite ({rewriter.name})")
    started = time.monotonic()
    for start in bar:
        if stop_after is not None and time.monotonic() - started > stop_after:
            break
        done.update(_rewrite_batch(todo.iloc[start : start + batch_size], rewriter, own_file(log)))
    if shard is None:  # with `shard`, another run may be appending to the log right now
        merge_logs(log, table["id"])
    done = _finished(log, table, rewriter) if world() > 1 else done
    finished = table[table["id"].isin(done)]
    return finished.assign(rewritten_text=finished["id"].map(done), source=rewriter.name).reset_index(drop=True)


def _rewrite_batch(batch: pd.DataFrame, rewriter: Rewriter, log: Path) -> dict[str, str]:
    rewritten = rewriter.rewrite(batch["original_text"].tolist(), batch["rewrite_prompt"].tolist())
    rows = [
        {
            "id": row,
            "original_text": original,
            "rewrite_prompt": prompt,
            "rewritten_text": text,
            "rewriter": rewriter.name,
            "seed": getattr(rewriter, "seed", 0),
        }
        for row, original, prompt, text in zip(
            batch["id"], batch["original_text"], batch["rewrite_prompt"], rewritten, strict=True
        )
    ]
    with full_disk_named(log):
        append_jsonl(log, rows)
    return {row["id"]: row["rewritten_text"] for row in rows}


def _finished(log: Path, table: pd.DataFrame, rewriter: Rewriter) -> dict[str, str]:
    """id -> rewritten text of the finished rows; refuses a log whose ids stand for other texts, prompts or rewriters."""
    expected = {
        row["id"]: {
            "original_text": row["original_text"],
            "rewrite_prompt": row["rewrite_prompt"],
            "rewriter": rewriter.name,
            "seed": getattr(rewriter, "seed", 0),
        }
        for row in table.to_dict("records")
    }
    fields = ("rewrite_prompt", "rewritten_text", "rewriter")
    rows = read_finished([log, *part_files(log)], expected, fields, ("rewriting", "rewritten"))
    return {identifier: row["rewritten_text"] for identifier, row in rows.items()}


def get_rewriter(profile: Profile, seed: int = 0) -> Rewriter:
    """The rewriter the profile can run: rules (the offline stand-in), torch, or Keras on JAX."""
    if profile.rewriter == "rules":
        from promptrec.rewriters.rules import RulesRewriter

        return RulesRewriter(seed=seed)
    if profile.rewriter == "hf":
        from promptrec.rewriters.hf import HuggingFaceRewriter

        return HuggingFaceRewriter(profile.rewriter_model, chat=profile.chat, seed=seed)
    from promptrec.rewriters.keras_gemma import KerasGemmaRewriter, KerasGeneration

    settings = override(KerasGeneration(max_new_tokens=384))
    return KerasGemmaRewriter(profile.rewriter_model, seed, settings.max_new_tokens, settings.batch_size)
