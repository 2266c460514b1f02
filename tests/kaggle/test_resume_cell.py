"""The cell of the hardware page with which a stopped run goes on."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hardware.md"


def test_the_page_s_cell_copies_what_a_stopped_run_had_finished(tmp_path):
    attached, working = tmp_path / "input" / "notebooks" / "me" / "part", tmp_path / "working"
    (attached / "adapter" / "checkpoints").mkdir(parents=True)
    (attached / "adapter" / "checkpoints" / "state.json").write_text("7")
    (attached / "rewrites.jsonl").write_text('{"id": "1"}\n')
    working.mkdir()
    (cell,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    exec(cell.replace('"/kaggle', f'"{tmp_path}'), {})
    assert (working / "rewrites.jsonl").read_text() == '{"id": "1"}\n'
    assert (working / "adapter" / "checkpoints" / "state.json").read_text() == "7"
