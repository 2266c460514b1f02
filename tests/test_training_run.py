"""What both ways of fine-tuning share: the triples are checked, a text is made to fit, a folder has one run."""

from dataclasses import dataclass

import pandas as pd
import pytest

from promptrec.errors import InputError
from promptrec.templates import recovery_answer, recovery_request
from promptrec.training_run import check_training, claim_folder, fit_texts

ROW = pd.Series({"original_text": "a b " * 300, "rewrite_prompt": "Shout it.", "rewritten_text": "A B " * 300})


def words(text: str, begin: bool = True) -> list[int]:
    """A tokenizer of one token a word; 1 is its beginning-of-sequence token."""
    return [1] * begin + [2 + sum(word.encode()) for word in text.split()]


@dataclass(frozen=True)
class Settings:
    steps: int = 4
    rank: int = 2
    time_budget: float = 0.0


def test_a_text_that_fits_is_left_alone():
    row = pd.Series({"original_text": "a b", "rewrite_prompt": "Shout it.", "rewritten_text": "A B"})
    request, answer = fit_texts(row, "gemma", words, 500)
    assert request == words(recovery_request("a b", "A B"))
    assert answer == words(recovery_answer("Shout it."), begin=False) and 1 not in answer


@pytest.mark.parametrize("longest", [100, 300, 700])
def test_long_texts_lose_words_and_the_answer_none(longest):
    request, answer = fit_texts(ROW, "gemma", words, longest)
    assert longest / 2 < len(request) + len(answer) <= longest
    assert answer == words(recovery_answer("Shout it."), begin=False)


def test_no_room_for_the_texts_is_said():
    with pytest.raises(InputError, match="max_tokens=12 leaves no room for the texts beside an answer of 2 tokens"):
        fit_texts(ROW, "gemma", words, 12)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"rewritten_text": " "}, "row 1: rewritten_text is blank"), ({"id": "a"}, "id 'a' occurs twice")],
)
def test_bad_training_data_is_refused(changes, reason):
    table = pd.DataFrame([ROW, ROW])
    check_training(table)
    with pytest.raises(InputError, match=f"training data: {reason}"):
        check_training(table.assign(**changes))


def test_a_folder_belongs_to_one_run_and_knows_when_it_is_finished(tmp_path):
    table = pd.DataFrame([ROW])
    claim = lambda settings, rows=table, base="tiny": claim_folder(tmp_path, settings, rows, base, "adapter.bin")  # noqa: E731
    assert not claim(Settings()) and not claim(Settings(time_budget=9.0))
    for other in (lambda: claim(Settings(rank=3)), lambda: claim(Settings(), base="huge")):
        with pytest.raises(InputError, match=r"this folder holds a run with other (settings|base_model)"):
            other()
    with pytest.raises(InputError, match="other data"):
        claim(Settings(), table.assign(rewrite_prompt="Whisper it."))
    pd.DataFrame({"step": [2, 4]}).to_csv(tmp_path / "history.csv", index=False)
    assert not claim(Settings())  # the adapter is still missing
    (tmp_path / "adapter.bin").touch()
    assert claim(Settings())
