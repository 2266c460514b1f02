"""One run in several processes: who am I, which rows are mine, and one result without loss or doubling.

torchrun and accelerate launch number their processes by RANK and WORLD_SIZE; without them a run is one process and every
function here does what one process needs. torch is imported only where there are several.

Each process appends to a file of its own (`OUT.part-3.jsonl`), so that hosts need no locks; a resumed run reads all of
them, whatever their number was, and the first process folds them into one.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TypeVar

import pandas as pd

from promptrec.data import text_id
from promptrec.errors import InputError
from promptrec.tables import read_jsonl, write_text

PATIENCE = timedelta(hours=12)  # how long a process that is done waits for the others; a dead one is noticed at once
Made = TypeVar("Made")


# --- who am I


def world() -> int:
    """The number of processes of this run."""
    return max(1, _number("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0."""
    return _number("RANK", 0) if world() > 1 else 0


def local_rank() -> int:
    """The number of this process on its host, from 0: the number of its GPU."""
    return _number("LOCAL_RANK", 0) if world() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes results and prints."""
    return rank() == 0


def processes() -> dict[str, int]:
    """What a manifest says about several processes; nothing about one."""
    return {"processes": world()} if world() > 1 else {}


def sharded() -> bool:
    """Whether accelerate launch asked for FSDP: every process holds a share of the weights."""
    return world() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "") or str(default)
    if not text.isdigit():
        raise InputError(f"{name}={text!r} is not a number; start the processes with torchrun")
    return int(text)


# --- together


def join():
    """Enter the group of processes (nccl where there are GPUs, else gloo), once; None for one process.

    Returns a gloo group of its own for this module's messages: they are small, on the CPU, and may be waited for longer
    than a gradient. Raises InputError where the environment is not a launcher's.
    """
    return _group() if world() > 1 else None


@cache
def _group():
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise InputError(f"WORLD_SIZE is {world()}, but {', '.join(missing)} is not set; start with torchrun")
    import torch
    import torch.distributed as dist

    on_gpu, gpus = torch.cuda.is_available(), torch.cuda.device_count()
    if on_gpu and local_rank() >= gpus:
        raise InputError(f"process {local_rank()} of this host has no GPU; start at most {gpus} on it")
    if on_gpu:
        torch.cuda.set_device(local_rank())
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def leave() -> None:
    """Leave the group, where this process is in one."""
    if _group.cache_info().currsize:
        import torch.distributed as dist

        dist.destroy_process_group()
        _group.cache_clear()


def gather(values: Sequence) -> list:
    """The values of all processes, one after the other; every process calls this."""
    if (group := join()) is None:
        return list(values)
    import torch.distributed as dist

    parts: list = [None] * world()
    dist.all_gather_object(parts, list(values), group=group)
    return [value for part in parts for value in part]


def barrier() -> None:
    """Wait until every process has come here."""
    gather([])


def from_first(make: Callable[[], Made]) -> Made:
    """What `make` returns in the first process, in all of them; so is its InputError.

    For what is to be done once, and for what must not differ by a rounding between hosts.
    """
    outcome = []
    if first():
        try:
            outcome = [(make(), None)]
        except InputError as error:
            if world() == 1:
                raise
            outcome = [(None, str(error))]
    ((made, error),) = gather(outcome)
    if error is not None:
        raise InputError(error)
    return made


# --- rows and files


def share(table: pd.DataFrame, index: int | None = None, count: int | None = None) -> pd.DataFrame:
    """The rows of process `index` out of `count` (default: this one's), in the order of the table.

    Every `count`-th row in the order of the ids' digests: it depends on the ids, not on the order of the table nor on
    what is finished already, so all processes agree without a word. Shares differ by one row at most.
    """
    index, count = (rank(), world()) if count is None else (index, count)
    ids = table["id"] if "id" in table else table.index.to_series()
    digests = ids.astype(str).map(text_id).to_numpy()
    return table.iloc[sorted(digests.argsort(kind="stable")[index::count])]


def own_file(path: str | Path) -> Path:
    """Where this process appends: `path`, or a part of it where there are several processes."""
    return Path(path) if world() == 1 else own_part(path)


def own_part(path: str | Path) -> Path:
    """This process's file beside `path`."""
    return Path(path).with_name(f"{Path(path).name}.part-{rank()}.jsonl")


def part_files(path: str | Path) -> list[Path]:
    """The files of all processes beside `path`, also those of an earlier run with more of them."""
    return sorted(Path(path).parent.glob(f"{glob.escape(Path(path).name)}.part-*.jsonl"))


def read_finished(
    files: Iterable[Path],
    expected: Mapping[str, Mapping[str, str]],
    fields: Iterable[str] = (),
    work: tuple[str, str] = ("finished", "done"),
) -> dict[str, dict]:
    """id -> row of what is finished, from logs of which any may have been cut off by a kill.

    `expected` says by id what a row must hold; a log of other texts or settings is refused (InputError), for its
    answers would be taken for this run's. `work` has the words for it: ("rewriting", "rewritten").
    """
    done: dict[str, dict] = {}
    for log in filter(Path.is_file, files):
        for number, row in enumerate(read_jsonl(log, tolerate_torn_tail=True), 1):
            if not {"id", *fields} <= row.keys() or not isinstance(row["id"], str):
                raise InputError(f"{log}: line {number} is not a row of a {work[0]} log; name a new --out file")
            for field, value in expected.get(row["id"], {}).items():
                if row.get(field, value) != value:  # a log of an earlier version may lack what is not in `fields`
                    raise InputError(
                        f"{log}: id {row['id']!r} was {work[1]} with another {field}; name a new --out file"
                    )
            done.setdefault(row["id"], row)
    return done


def merge_logs(path: str | Path, ids: Iterable[str]) -> None:
    """Fold the processes' files into the log `path`: one line an id, in the order of `ids`, others behind.

    Every process calls this when its rows are done. The parts are removed once the whole is on the disk; a kill before
    that leaves both, and the next merge sees the same ids twice and keeps one.
    """
    barrier()
    if first() and (parts := part_files(path)):
        rows = read_finished([Path(path), *parts], expected={})
        order = [identifier for identifier in ids if identifier in rows]
        ordered = [rows.pop(identifier) for identifier in order] + list(rows.values())
        write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered), path)
        remove_parts(path)
    barrier()


def remove_parts(path: str | Path) -> None:
    """Remove the processes' files, once `path` holds what was in them, and is on the disk."""
    if not (parts := part_files(path)):
        return
    with open(path, "rb") as whole:
        os.fsync(whole.fileno())
    for part in parts:
        part.unlink()
