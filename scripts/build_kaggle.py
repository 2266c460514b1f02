"""Build what goes to Kaggle in build/kaggle: a data set of wheels, the kernels of each profile, standalone notebooks.

    python scripts/build_kaggle.py --owner NAME [--no-download] [--out DIR]
    python scripts/build_kaggle.py --standalone [--out DIR]

The owner is your name on Kaggle (or KAGGLE_USERNAME). With --no-download nothing is fetched; wheels that are missing
are named. A standalone notebook carries the sources of promptrec that it imports and needs no data set of ours.
What is built, from what, stands in kaggle/kaggle.yaml.
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import lru_cache
from pathlib import Path

import jupytext
import nbformat
import pandas as pd
import yaml

from promptrec.errors import InputError
from promptrec.profiles import PROFILES
from promptrec.series import parts_of
from promptrec.tables import write_json

ROOT = Path(__file__).resolve().parents[1]
PLAN = yaml.safe_load((ROOT / "kaggle" / "kaggle.yaml").read_text(encoding="utf-8"))
SOURCE_LIMIT = 1_000_000  # bytes: Kaggle refuses to save a larger notebook
TRIPLES, ORIGINALS = "promptrec/assets/triples.csv", "promptrec/assets/originals.csv"
OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

INSTALL = """\
# Installs promptrec and what Kaggle's image lacks from the attached data set {slug}; the internet stays off.
import os
import subprocess
import sys
from pathlib import Path

os.environ["PROMPTREC_PROFILE"] = "{profile}"
inputs = Path(os.environ.get("PROMPTREC_INPUT", "/kaggle/input"))
wheels = sorted(map(str, inputs.rglob("{slug}/**/*.whl")))
assert wheels, "attach the data set {slug} (Add Input), then run this cell again"
subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *wheels], check=True)
"""

CARRIED = """\
# Writes the sources of promptrec to the working folder: this notebook needs no attached package.
# Libraries that the image lacks are installed from any attached data set of wheels.
import base64
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

os.environ["PROMPTREC_PROFILE"] = "{profile}"
inputs = Path(os.environ.get("PROMPTREC_INPUT", "/kaggle/input"))
if wheels := sorted(str(path) for path in inputs.rglob("*.whl") if not path.name.startswith("promptrec-")):
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *wheels], check=True)
PACKED = (
    "{packed}"
)
with tarfile.open(fileobj=io.BytesIO(base64.b85decode(PACKED)), mode="r:xz") as archive:
    archive.extractall(Path.cwd(), filter="data")
sys.path.insert(0, str(Path.cwd()))
import promptrec

print("promptrec from", Path(promptrec.__file__).parent)
"""


# --- the data set


def pins() -> dict[str, str]:
    """Version of every library as this series was tested with it (constraints.txt)."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)


def build_wheel(folder: Path) -> Path:
    """promptrec's own wheel, assets inside, built from a copy so that the clone stays as it is."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy2(ROOT / name, copy)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "promptrec", copy / "promptrec", ignore=ignored)
        options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
        _pip("wheel", *options, str(copy))
    return next(folder.glob("promptrec-*.whl"))


def download_wheels(folder: Path) -> None:
    """The wheels of the plan for Kaggle's Python, in the pinned versions."""
    platforms = [part for platform in PLAN["platforms"] for part in ("--platform", platform)]
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(folder)]
    wanted = [f"{name}=={pins()[name]}" for name in PLAN["wheels"]]
    _pip("download", *options, "--python-version", PLAN["python"], *platforms, *wanted)


def missing_wheels(folder: Path) -> list[str]:
    """Pinned libraries of the plan that have no wheel in the folder."""
    there = {tuple(path.name.lower().split("-")[:2]) for path in folder.glob("*.whl")}
    wanted = {name: pins()[name] for name in PLAN["wheels"]}
    return [f"{name}=={pin}" for name, pin in wanted.items() if (name.replace("-", "_"), pin) not in there]


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--disable-pip-version-check", *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise InputError(f"pip {arguments[0]} failed: {last}; with --no-download nothing is fetched")


def write_dataset(owner: str, folder: Path, download: bool) -> list[str]:
    """Data set folder, ready for `kaggle datasets create`; returns the wheels that are still missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("promptrec-*.whl"):
        old.unlink()
    build_wheel(folder)
    if download:
        download_wheels(folder)
    plan = PLAN["dataset"]
    metadata = {key: plan[key] for key in ("title", "subtitle", "description")}
    metadata |= {"id": f"{owner}/{plan['slug']}", "licenses": [{"name": plan["license"]}]}
    write_json(metadata, folder / "dataset-metadata.json")
    return missing_wheels(folder)


# --- the kernels


def kernel_slug(profile: str, part: str) -> str:
    """promptrec-t4x2-1-generate-data: the title in lower case with dashes, as Kaggle makes slugs from titles."""
    return f"promptrec-{profile.removeprefix('kaggle-')}-{part}"


def kernel_metadata(owner: str, profile: str, part: str) -> dict:
    """kernel-metadata.json: machine, no internet, and every input of the part, the parts before it included."""
    plan, parts = PLAN["profiles"][profile], parts_of(PROFILES[profile])
    slug = kernel_slug(profile, part)
    return {
        "id": f"{owner}/{slug}",
        "title": slug.replace("-", " "),
        "code_file": f"{part}.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_internet": False,
        **plan["metadata"],
        "dataset_sources": [f"{owner}/{PLAN['dataset']['slug']}", *(PLAN["corpora"] if part == parts[0] else [])],
        "competition_sources": [PLAN["competition"]],
        "kernel_sources": [f"{owner}/{kernel_slug(profile, earlier)}" for earlier in parts[: parts.index(part)]],
        "model_sources": [plan["base_model"], PLAN["sentence_t5"]],
    }


def for_kaggle(part: str, first_cell: str) -> nbformat.NotebookNode:
    """A part without outputs, `first_cell` in front, its markdown as Kaggle can show it."""
    notebook = jupytext.read(ROOT / "notebooks" / f"{part}.py")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = plain_markdown(cell.source)
    notebook.cells.insert(1, nbformat.v4.new_code_cell(first_cell))
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def plain_markdown(text: str) -> str:
    """MyST as Kaggle's markdown: figures become their descriptions, admonitions quotes, references plain names."""
    text = re.sub(r"```\{image\}.*?:alt: (.*?)\n.*?```", r"*Figure: \1*", text, flags=re.DOTALL)
    quoted = lambda match: f"> **{match[1].title()}.** " + match[2].strip().replace("\n", "\n> ")  # noqa: E731
    text = re.sub(r":::\{(\w+)\}\n(.*?):::", quoted, text, flags=re.DOTALL)
    return re.sub(r"\{doc\}`([^`]+)`", r"*\1*", text)


def write_kernels(owner: str, profile: str, folder: Path) -> None:
    """One folder a part, ready for `kaggle kernels push`."""
    for part in parts_of(PROFILES[profile]):
        write_json(kernel_metadata(owner, profile, part), folder / part / "kernel-metadata.json")
        cell = INSTALL.format(slug=PLAN["dataset"]["slug"], profile=profile)
        nbformat.write(for_kaggle(part, cell), folder / part / f"{part}.ipynb")


# --- the standalone notebooks


def module_file(name: str) -> Path | None:
    """The source of a module of promptrec; None where the name is no module."""
    path = ROOT.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imported(source: str) -> set[str]:
    """The modules of promptrec that a source imports, at its top or within a function."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] == "promptrec" and module_file(name)}


def needed_modules(source: str) -> list[str]:
    """Those and what they import in turn, with the packages they lie in."""
    found, todo = set(), imported(source)
    while todo:
        name = todo.pop()
        found.add(name)
        parents = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)}
        todo |= (imported(module_file(name).read_text(encoding="utf-8")) | parents) - found
    return sorted(found)


@lru_cache
def pack(files: tuple[tuple[str, bytes], ...]) -> str:
    """Files as a compressed archive in text (base 85); the same files give the same text."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return base64.b85encode(lzma.compress(archive.getvalue(), preset=9)).decode("ascii")


def with_fewer_triples(files: dict[str, bytes], share: float) -> dict[str, bytes]:
    """The files with `share` of the hand-written training triples, shortest first, and the originals they still need.

    Held-out triples all stay. Files without triples come back as they are.
    """
    if TRIPLES not in files:
        return files
    triples, originals = (
        pd.read_csv(io.BytesIO(files[name]), dtype=str, keep_default_na=False) for name in (TRIPLES, ORIGINALS)
    )
    train = triples["split"] == "train"
    lengths = (triples["original_text"] + triples["rewritten_text"]).str.len()
    triples = triples[~train | (lengths.where(train).rank(method="first") <= round(share * train.sum()))]
    originals = originals[originals["text"].isin(triples["original_text"])]
    tables = {TRIPLES: triples, ORIGINALS: originals}
    return files | {name: table.to_csv(index=False).encode("utf-8") for name, table in tables.items()}


def standalone(profile: str, part: str, share: float = 1.0) -> str:
    """A part that carries the sources and assets it needs, with `share` of the hand-written training triples, as JSON."""
    cells = jupytext.read(ROOT / "notebooks" / f"{part}.py").cells
    modules = needed_modules("\n".join(cell.source for cell in cells if cell.cell_type == "code"))
    paths = [module_file(name) for name in modules]
    paths += [ROOT / "promptrec" / "assets" / name for name in PLAN["assets"].get(part, [])]
    files = with_fewer_triples({str(path.relative_to(ROOT)): path.read_bytes() for path in paths}, share)
    cell = CARRIED.format(profile=profile, packed=pack(tuple(files.items())))
    return nbformat.writes(for_kaggle(part, cell))


def largest_that_fits(profile: str, part: str) -> tuple[str, float]:
    """The standalone notebook with as many training triples as Kaggle's limit leaves room for, and their share."""
    most, least = (len(standalone(profile, part, share)) for share in (1.0, 0.0))
    share = 1.0 if most < SOURCE_LIMIT else (SOURCE_LIMIT - least) / (most - least)
    while share >= 0:
        text = standalone(profile, part, share)
        if len(text.encode("utf-8")) < SOURCE_LIMIT:
            return text, share
        share -= 0.02
    raise InputError(f"{part}: over {SOURCE_LIMIT:,} bytes as a standalone notebook; carry fewer assets")


def write_standalone(profile: str, folder: Path) -> dict[str, float]:
    """Every part as one file below Kaggle's limit; returns the share of the training triples each one carries."""
    folder.mkdir(parents=True, exist_ok=True)
    shares = {}
    for part in parts_of(PROFILES[profile]):
        text, shares[part] = largest_that_fits(profile, part)
        (folder / f"{part}.ipynb").write_text(text, encoding="utf-8")
    return shares


# --- the command


def owner_of(given: str | None) -> str:
    """The name on Kaggle. Raises InputError where there is none or it is no name."""
    owner = given or os.environ.get("KAGGLE_USERNAME", "")
    if not OWNER.fullmatch(owner):
        raise InputError(f"owner {owner!r} is no Kaggle name; pass --owner NAME or set KAGGLE_USERNAME")
    return owner


def build(arguments: argparse.Namespace) -> None:
    owner = None if arguments.standalone else owner_of(arguments.owner)
    for profile in PLAN["profiles"]:
        for part, share in write_standalone(profile, arguments.out / "standalone" / profile).items():
            note = f" (with {share:.0%} of the hand-written training triples: 1 MB is the limit)" if share < 1 else ""
            print(f"{arguments.out}/standalone/{profile}/{part}.ipynb{note}")
        if owner:
            write_kernels(owner, profile, arguments.out / profile)
    if not owner:
        return
    dataset = arguments.out / "dataset"
    missing = write_dataset(owner, dataset, not arguments.no_download)
    print(f"\nkaggle datasets create -p {dataset}")
    for profile in PLAN["profiles"]:
        for part in parts_of(PROFILES[profile]):
            print(f"kaggle kernels push -p {arguments.out / profile / part}")
    if missing:
        raise InputError(f"{dataset}: {len(missing)} wheel(s) missing: {', '.join(missing)}; run without --no-download")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owner", help="your name on Kaggle; default: KAGGLE_USERNAME")
    parser.add_argument("--no-download", action="store_true", help="fetch nothing, say which wheels are missing")
    parser.add_argument("--standalone", action="store_true", help="only the standalone notebooks; needs no owner")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "kaggle")
    try:
        build(parser.parse_args())
    except InputError as error:
        print(f"build_kaggle: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
