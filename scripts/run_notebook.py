"""Execute percent scripts and keep the .ipynb with its outputs beside each.

    python scripts/run_notebook.py notebooks/beyond/*.py [--out runs/local]

The notebooks of the series run through `promptrec series`, in their order; this is for those that stand alone.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from promptrec.profiles import activate, get_profile
from promptrec.series import execute_notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/local"), help="where the notebooks read and write results"
    )
    given = parser.parse_args()
    profile = activate(get_profile())
    out = given.out.resolve()  # the kernel runs in the folder of its notebook
    out.mkdir(parents=True, exist_ok=True)
    for source in given.sources:
        started = time.time()
        execute_notebook(source, source.with_suffix(".ipynb"), profile, out)
        print(f"{source}: {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
