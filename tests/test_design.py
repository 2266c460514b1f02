"""The table of modules in docs/design.md: whole, and in the order of the imports."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def rows_of_modules() -> dict[str, int]:
    """Module -> its row in the table."""
    table = (ROOT / "docs" / "design.md").read_text().split("| module | what it is for |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return {name: row for row, cell in enumerate(cells) for name in re.findall(r"`(\w+)(?:\.py|/)`", cell)}


def imported(source: str) -> Iterator[str]:
    """Modules of the package that a source imports, inside functions too, but for type checkers only."""
    tree = ast.parse(source)
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    unseen = {id(inner) for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in unseen:
            package, _, module = node.module.partition(".")
            if package == "promptrec":
                yield from [module.split(".")[0]] if module else [alias.name for alias in node.names]


def test_every_module_stands_in_the_table():
    there = {path.stem for path in (ROOT / "promptrec").glob("*.py") if not path.stem.startswith("__")}
    assert set(rows_of_modules()) == there | {"rewriters"}


def test_a_module_imports_only_what_stands_above_it_or_beside_it():
    rows, wrong = rows_of_modules(), []
    for path in (ROOT / "promptrec").rglob("*.py"):
        own = path.relative_to(ROOT / "promptrec").parts[0].removesuffix(".py")
        below = [name for name in imported(path.read_text()) if own in rows and rows.get(name, 0) > rows[own]]
        wrong += [f"{path.name} imports {name}" for name in below]
    assert not wrong
