"""The table of methods: every row can be built, and is refused in one line where it cannot run."""

import pandas as pd
import pytest

from promptrec.data import shipped_triples
from promptrec.errors import InputError
from promptrec.inference import answer_column
from promptrec.methods import (
    METHODS,
    Joint,
    Method,
    Task,
    build,
    check_method,
    make_recoverer,
    methods_of,
    shipped_wordings_of,
    training_triples,
)
from promptrec.profiles import get_profile


def test_every_method_names_a_builder_that_exists():
    for name, method in METHODS.items():
        module, _, function = method.builder.partition(":")
        assert callable(getattr(__import__(f"promptrec.{module}", fromlist=[function]), function)), name
        assert set(method.needs) <= set(METHODS) and name not in method.needs


def test_a_profile_without_torch_runs_what_needs_none():
    local, keras = get_profile("local"), get_profile("kaggle-tpu")
    assert methods_of(local) == list(METHODS)
    assert {"embedding", "zero-shot", "fine-tuned", "constant"} <= set(methods_of(keras)) < set(METHODS)
    check_method("dpo", local)
    with pytest.raises(InputError, match=r"method dpo: profile kaggle-tpu runs no torch; choose one of .*embedding"):
        check_method("dpo", keras)
    with pytest.raises(InputError, match="method 'psychic' is unknown; choose one of constant, best-constant"):
        check_method("psychic", local)


def test_a_task_s_bank_holds_its_own_prompts_and_the_shipped_ones(tmp_path):
    train = shipped_triples(["train"]).head(4).assign(rewrite_prompt="Say it with flowers and nothing else")
    task = Task(get_profile("local"), train, train, tmp_path)
    assert "Say it with flowers and nothing else" in task.bank and len(task.bank) > 5000
    assert task.clusters.tolist() == [0] * 4


def test_held_out_rows_of_a_users_file_are_not_trained_on(tmp_path):
    rows = shipped_triples(["test"]).head(3)[["original_text", "rewrite_prompt", "rewritten_text"]]
    path = tmp_path / "t.csv"
    rows.assign(split=["train", "test", "validation"]).to_csv(path, index=False)
    prompts = set(training_triples([path])["rewrite_prompt"])
    assert [prompt in prompts for prompt in rows["rewrite_prompt"]] == [True, False, False]
    rows.to_csv(path, index=False)
    assert set(rows["rewrite_prompt"]) <= set(training_triples([path])["rewrite_prompt"])


def test_held_out_prompts_that_the_user_trains_on_are_not_chosen_by(tmp_path, monkeypatch):
    held = shipped_triples(["validation"])
    columns, known = ["original_text", "rewrite_prompt", "rewritten_text"], held["rewrite_prompt"].unique()
    held[held["rewrite_prompt"].isin(known[:50])][columns].to_csv(tmp_path / "some.csv", index=False)
    ours = [f"The ferry number {n} leaves the old harbour at six." for n in range(len(known))]
    rows = pd.DataFrame({"original_text": ours, "rewrite_prompt": known, "rewritten_text": known + " Ahoy, sailor!"})
    rows.to_csv(tmp_path / "all.csv", index=False)
    tasks = []
    monkeypatch.setattr("promptrec.methods.build", lambda name, task: tasks.append(task))
    make_recoverer("blend", get_profile("local"), [tmp_path / "some.csv"])
    left = set(tasks[0].validation["rewrite_prompt"])
    assert left and not left & set(known[:50]) and not left & set(tasks[0].train["rewrite_prompt"])
    with pytest.raises(InputError, match=r"method blend: .* nothing is left to choose by"):
        make_recoverer("blend", get_profile("local"), [tmp_path / "all.csv"])


def test_wordings_of_what_is_asked_are_kept_out_of_the_bank(tmp_path, monkeypatch):
    shipped = pd.DataFrame({"rewrite_prompt": ["Make it rhyme", "Turn the text into a legal contract"]})
    monkeypatch.setattr("promptrec.methods.shipped_prompts", lambda: shipped)
    assert shipped_wordings_of(["make it rhyme."]) == ["Make it rhyme"]
    train = shipped_triples(["train"]).head(1)
    task = Task(get_profile("local"), train, train, tmp_path, avoid=frozenset(["Make it rhyme"]))
    assert task.bank == sorted(["Turn the text into a legal contract", *train["rewrite_prompt"]])


class Saying:
    """Answers with a word and what it finds in the table."""

    def __init__(self, word: str) -> None:
        self.word = word

    def recover(self, table: pd.DataFrame) -> list[str]:
        known = [name for name in table if name.startswith(answer_column(""))]
        return [" ".join([self.word, *row]) for row in table[known].astype(str).itertuples(index=False)]


def test_a_method_that_works_on_answers_asks_for_them_first(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "alone", Method("a test", "a test", "alone:build"))
    monkeypatch.setitem(METHODS, "upon", Method("a test", "a test", "upon:build", needs=("alone",)))
    monkeypatch.setattr(Method, "build", lambda self, task: Saying(self.builder.partition(":")[0]))
    held = shipped_triples(["validation"]).head(2)
    recoverer = build("upon", Task(get_profile("local"), held, held, tmp_path))
    assert isinstance(recoverer, Joint)
    assert recoverer.recover(held[["id", "original_text", "rewritten_text"]]) == ["upon alone"] * 2


def test_what_is_asked_for_by_name_is_checked_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("promptrec.methods.training_triples", lambda train: pytest.fail("it loaded data"))
    with pytest.raises(InputError, match="unknown"):
        make_recoverer("psychic", get_profile("local"))
