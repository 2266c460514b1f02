"""Build the Jupyter Book with warnings as errors.

    python scripts/build_book.py [--notebooks DIR] [--out DIR]

Without arguments the book is built in the repository from the committed notebooks. With --notebooks (the executed
notebooks of a run) and --out the sources are copied to DIR first, so that a run's own book leaves the clone untouched.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "_config.yml",
    "_toc.yml",
    "images",
    "docs",
    "notebooks",
)


def stage(notebooks: Path | None, folder: Path) -> None:
    """Copy the book's sources to `folder`, with the notebooks of a run in place of the committed ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy2(source, folder / name)
    for path in (notebooks or Path("none")).glob("*.ipynb"):
        shutil.copy2(path, folder / "notebooks" / path.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notebooks", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = args.out or ROOT
    if args.out:
        stage(args.notebooks, folder)
    executable = Path(sys.executable).with_name("jupyter-book")
    command = [str(executable), "build", "-W", "--all", "--quiet", str(folder)]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
