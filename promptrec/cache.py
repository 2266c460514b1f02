"""What is kept on disk between runs, by content: arrays written all at once, read where they are whole.

A cache is never needed: one that cannot be written or read costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from promptrec.tables import write_atomically


def cache_folder() -> Path:
    """Where embeddings and fitted predictors are kept: PROMPTREC_CACHE, else ~/.cache/promptrec."""
    return Path(os.environ.get("PROMPTREC_CACHE") or Path.home() / ".cache" / "promptrec")


def digest(*parts: object) -> str:
    """Content key of strings (or of anything with a stable repr)."""
    joined = "\x00".join(part if isinstance(part, str) else repr(part) for part in parts)
    return hashlib.sha256(joined.encode()).hexdigest()[:32]


def fingerprint(encode: Callable[[list[str]], np.ndarray]) -> list[float]:
    """What tells encoders of one name apart: a sentence's vector, rounded far above the noise of floating point."""
    return encode(["Rewrite the text so that a child would understand it."])[0].round(2).tolist()


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz all at once: a killed run leaves no half file. A cache that cannot be written is left out."""
    with suppress(OSError):
        write_atomically(path, lambda target: np.savez(target, **arrays))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What save_arrays wrote; empty where there is no file, or none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            arrays = dict(saved)
    except (OSError, ValueError, EOFError, BadZipFile):
        return {}
    with suppress(OSError):  # a cache may be read-only
        os.utime(path)  # so that keep_last_used keeps it
    return arrays


def packed(texts: Iterable[str]) -> np.ndarray:
    """Texts as one array of bytes; an array of texts would give each as much room as the longest takes."""
    return np.frombuffer(json.dumps(list(texts)).encode(), np.uint8)


def unpacked(array: np.ndarray) -> list[str]:
    """The texts of `packed`."""
    return json.loads(array.tobytes())


def keep_last_used(folder: Path, most: int) -> None:
    """Remove all but the `most` arrays of a folder that were used last: a cache of large files must not grow for ever."""
    with suppress(OSError):
        used = sorted(folder.glob("[!.]*.npz"), key=lambda path: path.stat().st_mtime)
        for path in used[:-most]:
            path.unlink(missing_ok=True)
