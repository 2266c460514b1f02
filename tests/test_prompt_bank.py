"""The grammar's prompts: many, distinct, balanced, suited to a kind of text, and read back exactly."""

from __future__ import annotations

import json
import sys

import pandas as pd
import pytest

from promptrec.errors import InputError
from promptrec.grammar import load_grammar
from promptrec.prompt_bank import (
    MIXTURE_SHARE,
    grammar_prompts,
    grammar_size,
    parse_prompt,
    prompts_for,
    readings,
    shipped_prompts,
)

TAXONOMIES = {"form", "style", "voice", "tone", "audience", "setting", "constraint", "edit", "mixture"}


@pytest.fixture(scope="module")
def series() -> pd.DataFrame:
    return grammar_prompts(5000, seed=0)


def test_every_style_is_complete():
    grammar = load_grammar()
    assert len(grammar.styles) >= 48
    for style in grammar.styles.values():
        assert style.taxonomy in TAXONOMIES - {"mixture"}
        assert set(style.kinds) <= {"any", *grammar.kinds}
        assert len(style.series) >= 12 and len(style.base) == 3
        assert len({pattern.text for pattern in style.series + style.base}) == len(style.series) + 3
        for pattern in style.series + style.base:
            holes = {name for name, _ in pattern.holes}
            assert set(style.slots) <= holes, f"{style.name}: {pattern.text!r} leaves out a slot"


def test_slots_have_enough_values():
    for name, values in load_grammar().slots.items():
        assert 15 <= len(values) <= 40 and len(set(values)) == len(values), name


def test_the_grammar_makes_well_above_five_thousand_prompts():
    singles, mixtures = grammar_size()
    assert singles > 5000 and mixtures > 5000
    assert min(grammar_size("base")) > 5000


def test_columns_and_distinct_prompts(series):
    assert list(series.columns) == ["rewrite_prompt", "style", "slots", "taxonomy", "kinds"]
    assert len(series) == 5000 and series["rewrite_prompt"].is_unique
    assert set(series["taxonomy"]) == TAXONOMIES
    assert not series["rewrite_prompt"].str.contains(r"[{}]|  ").any()


def test_styles_are_balanced_and_mixtures_are_a_share(series):
    mixed = series["style"].str.contains("+", regex=False)
    assert abs(mixed.mean() - MIXTURE_SHARE) < 0.01
    counts = series.loc[~mixed, "style"].value_counts()
    assert set(counts.index) == set(load_grammar().styles)
    assert counts.max() - counts.min() <= 1


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others():
    first = grammar_prompts(300, seed=4)
    pd.testing.assert_frame_equal(first, grammar_prompts(300, seed=4))
    assert first["rewrite_prompt"].tolist() != grammar_prompts(300, seed=5)["rewrite_prompt"].tolist()


@pytest.mark.parametrize("part", ["series", "base"])
def test_parse_is_the_inverse_of_the_grammar(part):
    prompts = grammar_prompts(4000, seed=1, part=part)
    for row in prompts.itertuples():
        found = list(readings(row.rewrite_prompt))
        assert len(found) == 1, f"{row.rewrite_prompt!r} can be read in {len(found)} ways"
        assert "+".join(style for style, _ in found[0]) == row.style
        assert {name: value for _, slots in found[0] for name, value in slots.items()} == json.loads(row.slots)


def test_no_wording_belongs_to_two_styles():
    grammar = load_grammar()  # _table raises InputError for a wording that two styles share
    assert len(grammar.requests) > 30_000 and len(grammar.wholes) > 500
    assert not set(grammar.requests) & set(grammar.wholes)
    for whole, (style, slots) in grammar.wholes.items():
        assert list(readings(whole)) == [[(style, slots)]], whole


def test_parsing_a_prompt_looks_wordings_up_and_never_walks_through_them(series):
    parse_prompt("Pirate version, please")  # the tables are built on first use
    prompts, executed = series["rewrite_prompt"].head(500), 0

    def count(frame, event, argument):
        nonlocal executed
        executed += event == "line"
        return count

    sys.settrace(count)
    try:
        for prompt in prompts:
            parse_prompt(prompt)
    finally:
        sys.settrace(None)
    assert 0 < executed / len(prompts) < 5000, executed / len(prompts)  # there are over 30,000 wordings


def test_base_wordings_never_appear_in_the_series(series):
    base = grammar_prompts(3000, seed=0, part="base")
    assert not set(base["rewrite_prompt"]) & set(series["rewrite_prompt"])
    for style in load_grammar().styles.values():
        assert not {pattern.text for pattern in style.base} & {pattern.text for pattern in style.series}


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Summarise the plot of Hamlet.",
        "Make this",
        "Rewrite this like a pirate and",
        "{it}",
        "turn it into",
    ],
)
def test_foreign_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="not a prompt of the grammar"):
        parse_prompt(prompt)


def test_mixtures_join_styles_that_go_together(series):
    grammar = load_grammar()
    for name in series.loc[series["taxonomy"] == "mixture", "style"]:
        one, two = (grammar.styles[style] for style in name.split("+"))
        assert frozenset({one.taxonomy, two.taxonomy}) in grammar.pairs
        assert not {one.name, two.name} & grammar.alone


def test_more_than_the_grammar_can_make_is_refused():
    possible = sum(grammar_size())
    with pytest.raises(ValueError, match=str(possible)):
        grammar_prompts(possible + 1, seed=0)
    with pytest.raises(ValueError, match="series, base"):
        grammar_prompts(10, seed=0, part="both")
    assert len(grammar_prompts(0, seed=0)) == 0


def test_kinds_of_text(series):
    recipe, story = prompts_for("recipe", series), prompts_for("short story", series)
    assert 0 < len(recipe) < len(story) <= len(series)
    assert "first_person" not in set(recipe["style"]) and "first_person" in set(story["style"])
    assert set(prompts_for("a kind nobody knows", series)["kinds"]) == {"any"}
    for_recipes = grammar_prompts(500, seed=0, kinds=["recipe"])
    assert len(prompts_for("recipe", for_recipes)) == 500
    with pytest.raises(ValueError, match="kinds"):
        prompts_for("recipe", series[["rewrite_prompt"]])


def test_shipped_prompts():
    shipped = shipped_prompts()
    assert list(shipped.columns) == ["rewrite_prompt", "taxonomy"]
    assert len(shipped) > 100 and shipped["rewrite_prompt"].str.strip().str.len().min() > 0


def test_styles_and_mixtures_can_be_limited():
    some = grammar_prompts(60, seed=1, styles=("pirate", "telegram", "place"), mixture_share=0.0)
    assert set(some["style"]) == {"pirate", "telegram", "place"}
    with pytest.raises(InputError, match="no style 'pirat'"):
        grammar_prompts(5, seed=1, styles=("pirat",))
