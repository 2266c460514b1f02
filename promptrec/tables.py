"""Tables in and out: CSV, JSONL and Parquet read alike, atomic writes, appended logs, manifests.

Does not know what the columns mean; see data.py for that.
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from promptrec.errors import InputError
from promptrec.profiles import attach_hint

READERS = {
    ".csv": lambda path: pd.read_csv(path, dtype={"id": str}, keep_default_na=False, na_values=[""]),
    ".jsonl": lambda path: pd.DataFrame(read_jsonl(path)),
    ".parquet": pd.read_parquet,
}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_DISK_SAID = ("No space left", "File too large", "quota exceeded", "PytorchStreamWriter", "inline_container.cc")
VERSIONED = ("numpy", "pandas", "torch", "transformers", "peft", "bitsandbytes", "tensorflow", "keras", "jax")


def read_table(path: str | Path, required: Iterable[str] = (), allow_empty: bool = False) -> pd.DataFrame:
    """Read a CSV, JSONL or Parquet table; `id`, where present, comes back as a string.

    Raises InputError for a missing file, an unknown format, a wrong encoding, an unreadable or empty
    table, and for missing `required` columns.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file in it")
    if not path.is_file():
        hint = attach_hint(path, f"check the path (current folder: {Path.cwd()})")
        raise InputError(f"{path}: no such file; {hint}")
    if path.suffix not in READERS:
        raise InputError(f"{path}: unknown format {path.suffix!r}; give a file ending in {', '.join(READERS)}")
    try:
        table = READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8 and try again") from None
    except pd.errors.EmptyDataError:
        raise InputError(f"{path}: the file is empty; it needs a header and at least one row") from None
    except InputError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{path}: cannot be read as {path.suffix[1:]} ({reason})") from None
    if table.empty and not allow_empty:
        raise InputError(f"{path}: the table has no rows")
    if not isinstance(table.index, pd.RangeIndex) and path.suffix == ".csv":
        # pandas makes an index of the cells that are too many
        raise InputError(f"{path}: its rows have more cells than the header names; quote texts that hold commas")
    require_columns(table, required, str(path))
    if "id" in table:
        if (odd := table["id"].map(lambda value: isinstance(value, list | dict))).any():
            raise InputError(f"{path}: row {int(odd.argmax()) + 1}: id is a list or an object; give text or a number")
        table["id"] = table["id"].map(_id_text)
    return table


def _id_text(value: object) -> object:
    """An id as a string, whether a format keeps 7 as 7 or as 7.0; a missing one as it is."""
    if pd.isna(value):
        return value
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def require_columns(table: pd.DataFrame, required: Iterable[str], where: str) -> None:
    """Raise InputError naming the missing and the present columns."""
    missing = [column for column in required if column not in table]
    if missing:
        raise InputError(
            f"{where}: no column {', '.join(missing)}; it has {', '.join(map(str, table.columns)) or 'none'}"
        )


def read_jsonl(path: str | Path, tolerate_torn_tail: bool = False) -> list[dict]:
    """Rows of a JSONL file. With `tolerate_torn_tail`, a last line without its newline (a killed run) is left out."""
    rows = []
    lines = Path(path).read_bytes().split(b"\n")
    if tolerate_torn_tail:
        lines.pop()  # what append_jsonl would cut off; it may end within a character
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: line {number} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
        except json.JSONDecodeError:
            raise InputError(f"{path}: line {number} is not valid JSON") from None
        if not isinstance(rows[-1], dict):
            raise InputError(f"{path}: line {number} is not a JSON object")
    return rows


def append_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Append rows and force them to disk, so that a kill loses at most the batch in flight.

    A torn last line (left by a kill in the middle of a write) is cut off first.
    """
    payload = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        _lock(file)  # processes that share a log take turns
        _cut_torn_tail(file)
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _lock(file) -> None:
    """Hold an open file for this process until it is closed, where the system has file locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    fcntl.flock(file, fcntl.LOCK_EX)


def _cut_torn_tail(file) -> None:
    """Truncate an open binary file after its last newline, if anything stands behind it."""
    keep = end = file.seek(0, os.SEEK_END)
    while keep > 0:
        start = max(0, keep - 65536)
        file.seek(start)
        newline = file.read(keep - start).rfind(b"\n")
        keep = start + newline + 1
        if newline >= 0:
            break
    if keep < end:
        file.truncate(keep)
    file.seek(0, os.SEEK_END)


def _quoting(table: pd.DataFrame) -> int:
    """How CSV cells are quoted: all texts where one holds a carriage return, which ends a line in an unquoted cell."""
    returns = any(table[name].astype(str).str.contains("\r", regex=False).any() for name in table)
    return csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL


def write_table(table: pd.DataFrame, path: str | Path) -> Path:
    """Write CSV, JSONL or Parquet by its ending, atomically: a reader sees the old file or the new one."""
    path = Path(path)
    writers = {
        ".csv": lambda target: table.to_csv(target, index=False, quoting=_quoting(table)),
        ".jsonl": lambda target: table.to_json(target, orient="records", lines=True, force_ascii=False),
        ".parquet": lambda target: table.to_parquet(target, index=False),
    }
    if path.suffix not in writers:
        raise InputError(f"{path}: unknown format {path.suffix!r}; name a file ending in {', '.join(writers)}")
    return write_atomically(path, writers[path.suffix])


def write_json(value: object, path: str | Path) -> Path:
    """Write JSON atomically, indented, keys as given."""
    return write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", path)


def read_json(path: str | Path) -> Any:
    """What write_json wrote. Raises InputError where it is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: is damaged ({error}); remove it") from None


def claim(mark: Path, facts: dict, holds: str) -> None:
    """Write what a folder is about to `mark` in it; one with other facts is refused (InputError): nothing gets mixed."""
    facts = json.loads(json.dumps(facts))
    if mark.is_file() and (found := read_json(mark)) != facts:
        differs = ", ".join(key for key in facts if found.get(key) != facts[key])
        raise InputError(f"{mark.parent}: this folder holds {holds} other {differs}; name a new one or remove it")
    write_json(facts, mark)


def write_text(text: str, path: str | Path) -> Path:
    """Write UTF-8 text atomically."""
    return write_atomically(Path(path), lambda target: Path(target).write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write) -> Path:
    """Write to a temporary file beside `path`, then rename; the temporary file never stays behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


@contextmanager
def full_disk_named(path: str | Path) -> Iterator[None]:
    """A full disk met inside becomes one line, whichever library met it."""
    try:
        yield
    except Exception as error:  # safetensors and torch have classes and words of their own for it
        if getattr(error, "errno", None) not in FULL_DISK and not any(words in str(error) for words in FULL_DISK_SAID):
            raise
        raise InputError(
            f"{path}: no space left on the disk; free some and start again, what is finished is kept"
        ) from None


def check_digest(path: Path, expected: str) -> None:
    """Raise InputError unless the file's SHA-256 is `expected`: embedded weights are never loaded unchecked."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; reinstall the package that ships it")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise InputError(
            f"{path}: SHA-256 is {found[:12]}..., expected {expected[:12]}...; the file is damaged or not ours"
        )


def write_manifest(
    artefact: str | Path, *, started: float, profile: str, seed: int, rows: int, **config: object
) -> Path:
    """Write `<artefact>.manifest.json`: how the artefact came to be, without secrets or environment variables.

    `started` is a time.time() stamp; settings dataclasses in `config` are saved field by field.
    """
    artefact = Path(artefact)
    manifest = {
        "artefact": artefact.name,
        "profile": profile,
        "seed": seed,
        "rows": rows,
        "seconds": round(time.time() - started, 1),
        "git_revision": _git_revision(),
        "versions": versions(),
        "config": {
            key: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
            for key, value in config.items()
        },
    }
    return write_json(manifest, artefact.with_name(artefact.name + ".manifest.json"))


def versions() -> dict[str, str]:
    """Installed versions of Python, the project and its frameworks, without importing them."""
    found = {"python": platform.python_version()}
    for name in ("promptrec", *VERSIONED):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def progress(iterable: Iterable | None, disable: bool = False, **options: object):
    """A tqdm bar on a terminal; silent elsewhere, so that committed notebooks hold no progress-bar debris.

    Of several processes (torchrun) the first one draws it.
    """
    from tqdm import tqdm

    disable = disable or not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"
    return tqdm(iterable, disable=disable, **options)
