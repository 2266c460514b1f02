"""The rule-based stand-in: every style changes the text, keeps its names, and can be told from the others."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest

from promptrec.cleaning import strip_lead_in
from promptrec.errors import InputError
from promptrec.grammar import load_grammar
from promptrec.prompt_bank import grammar_prompts
from promptrec.rewriters import Rewriter
from promptrec.rewriters.rule_text import fix_articles, lower_first, names, sentences, swap
from promptrec.rewriters.rule_words import lexicon, past_of, third_person
from promptrec.rewriters.rules import LEAD_INS, RulesRewriter, rewrite_as

TEXTS = [
    "Marta Odell opened a small bakery in Lyon in 1998. She bakes forty loaves every morning, and the red "
    "door is never locked. Her brother Pierre was a sailor. When the river flooded the street, the "
    "children carried the bread to the old church.",
    "The council of Brackwater voted on Tuesday to close the swimming pool on Elm Road. Repairs would "
    "cost 2.4 million pounds. Councillor Hasan said that the money was needed for schools. About 300 "
    "people protested.",
    "Boil 500 g of potatoes in salted water for 15 minutes. Drain them, crush them with a fork and add "
    "two spoons of olive oil. Roast until the edges are brown. Serve with Gruyere and chives.",
    "Dear Mr. Feldman, the printer on the third floor is broken again. I called the service twice, but "
    "nobody came. Could you please order a new one before Friday? Kind regards, Naomi",
    "The grey heron hunts at dawn in the marshes near Valdoria. It stands still for an hour, then strikes "
    "quickly. A grown bird eats half a kilo of fish a day. Farmers dislike it because it visits their "
    "ponds.",
    '"Did you feed the cat?" asked Tobias.\n'
    '"I thought that you did," said Wilma.\n'
    '"She ate the lasagna."\n'
    '"All of it?"\n'
    '"All of it, and the dish is gone too."',
    "The Lumora 3 is a lamp with a wooden foot and a soft yellow light. The battery lasts eleven hours. "
    "It weighs 410 grams and comes in black and white. You can order it from Nordholm until May.",
    "We measured the sleep of 48 students in Utrecht over six weeks. Those who read before bed slept 23 "
    "minutes longer. Screens had no effect. We suggest that calm reading helps, and we will repeat the "
    "study.",
    "Late on Saturday Ivo Brandt scored twice for Rovers. The crowd sang, the rain fell, and the "
    "goalkeeper of Whitmoor lost a boot in the mud. It was the first win since March.",
    "My grandfather kept nails in a jar\n"
    "and bees behind the shed,\n"
    "he never told us where they went\n"
    "when he and Clara wed.",
    "I lost my umbrella on the tram to Kessler Street. The driver waved. I waved back.",
    "In 1644 the village of Tolland was occupied three times. A constable named Josias Perrin kept the "
    "bills for years and left them to Grace, his daughter. She went to London and was paid eleven pounds.",
]
STYLES = sorted(load_grammar().styles)
# Styles that may give a name another case, a hashtag or a line break; all its letters must be there.
RESHAPING = {"telegram", "headline", "haiku", "all_caps", "tweet", "sea_shanty", "couplets"}


def slots_of(style: str, text: str) -> dict[str, str]:
    grammar, rng = load_grammar(), Random(f"{style} {text}")
    return {name: rng.choice(grammar.slots[name]) for name in grammar.styles[style].slots}


def rewritten(style: str, text: str, seed: int = 0) -> str:
    return rewrite_as(text, [(style, slots_of(style, text))], Random(f"{seed} {style} {text}"))


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return grammar_prompts(240, seed=2)["rewrite_prompt"].tolist()


def squeezed(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


@pytest.mark.parametrize("style", STYLES)
def test_a_style_changes_every_text_visibly(style):
    for text in TEXTS:
        out = rewritten(style, text)
        assert out.strip() == out and out
        assert out != text
        assert squeezed(out) != squeezed(text) or style in {"haiku", "all_caps", "emojis"}, out
        assert len(out.split()) < 4 * len(text.split()) + 60
        assert not any(hole in out for hole in "{}"), out


@pytest.mark.parametrize("style", STYLES)
def test_names_are_kept(style):
    for text in TEXTS:
        out = rewritten(style, text)
        for name in names(text):
            if style in RESHAPING:
                assert squeezed(name) in squeezed(out), f"{name} is gone: {out}"
            else:
                assert name in " ".join(out.split()), f"{name} is gone: {out}"


@pytest.mark.parametrize("style", [name for name in STYLES if load_grammar().styles[name].slots])
def test_slot_values_show_up(style):
    for text in TEXTS:
        for name, value in slots_of(style, text).items():
            wanted = value.split(" ", 1)[1] if name == "creature" else value
            assert wanted.lower() in " ".join(rewritten(style, text).lower().split())


def test_every_slot_value_can_be_played():
    grammar = load_grammar()
    for style in grammar.styles.values():
        for slot in style.slots:
            for value in grammar.slots[slot]:
                out = rewrite_as(TEXTS[0], [(style.name, {slot: value})], Random(value))
                assert value.split(" ", 1)[-1].lower() in out.lower()


def test_styles_differ_pairwise():
    for text in TEXTS[:3]:
        outs = {style: rewritten(style, text) for style in STYLES}
        assert all(outs[one] != outs[two] for one, two in combinations(STYLES, 2))


def test_the_same_row_gives_the_same_text_in_any_batch(prompts):
    rewriter = RulesRewriter(seed=7)
    originals = [TEXTS[i % len(TEXTS)] for i in range(len(prompts))]
    together = rewriter.rewrite(originals, prompts)
    backwards = RulesRewriter(seed=7).rewrite(originals[::-1], prompts[::-1])[::-1]
    alone = [rewriter.rewrite([text], [prompt])[0] for text, prompt in zip(originals, prompts, strict=True)]
    assert together == backwards == alone
    assert together != RulesRewriter(seed=8).rewrite(originals, prompts)


def test_repeated_sampling_varies_the_wording():
    for style in STYLES:
        assert len({rewritten(style, TEXTS[0], seed) for seed in range(12)}) > 2, style


def test_contract_and_support():
    rewriter = RulesRewriter()
    assert isinstance(rewriter, Rewriter) and rewriter.name == "rules (stand-in)"
    rewriter.check(["Pirate version, please"])
    with pytest.raises(InputError, match="'Draw me a sheep' is not a prompt of the grammar"):
        rewriter.check(["Pirate version, please", "Draw me a sheep"])
    assert rewriter.rewrite([], []) == []


def test_bad_input_is_refused_in_one_line():
    rewriter = RulesRewriter()
    for originals, prompts in [
        (["A text."], ["Draw me a sheep"]),
        (["   "], ["Pirate version, please"]),
        (["A text."], []),
    ]:
        with pytest.raises(ValueError) as error:
            rewriter.rewrite(originals, prompts)
        assert "\n" not in str(error.value)


def test_odd_texts_pass_through_every_style():
    for text in [
        "Ok",
        "42",
        "...",
        "no capitals here",
        "Zoë!!! «Ça va?» — oui…",
        "- one\n- two\n\n- three",
        "A {b} c.",
    ]:
        for style in STYLES:
            assert rewritten(style, text)


def test_some_rewrites_begin_with_a_lead_in_that_cleaning_removes(prompts):
    rewriter = RulesRewriter()
    outs = [out for text in TEXTS for out in rewriter.rewrite([text] * len(prompts), prompts)]
    led = [out for out in outs if out.startswith(LEAD_INS)]
    assert 0.015 < len(led) / len(outs) < 0.045
    for out in led:
        lead_in = next(lead for lead in LEAD_INS if out.startswith(lead))
        assert strip_lead_in(out) == out[len(lead_in) :].strip()
    assert all(strip_lead_in(out) == out for out in set(outs) - set(led))


def test_mixtures_show_both_styles():
    text = TEXTS[0]
    out = rewrite_as(text, [("bullets", {}), ("place", {"place": "Iceland"})], Random(3))
    assert "Iceland" in out and out.count("\n") >= 3


def test_styles_can_be_recovered_from_unseen_texts():
    """Word n-grams tell the 70 styles apart on texts that the classifier has never met (98% when written)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestCentroid

    def rows(texts: list[str], seeds: range) -> tuple[list[str], list[str]]:
        pairs = [(rewritten(style, text, seed), style) for text in texts for seed in seeds for style in STYLES]
        return [out for out, _ in pairs], [style for _, style in pairs]

    train, wanted = rows(TEXTS[:8], range(3))
    unseen, truth = rows(TEXTS[8:], range(2))
    marks = r"\w+|[^\w\s]|\n"
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, lowercase=False, token_pattern=marks)
    classifier = NearestCentroid().fit(vectors.fit_transform(train), wanted)
    found = classifier.predict(vectors.transform(unseen))
    right = sum(one == two for one, two in zip(found, truth, strict=True)) / len(truth)
    assert right > 0.95, f"only {right:.1%} of the styles were recognised"


def test_openings_name_the_slot():
    """Where chance leaves the slot out of the body, an opening is added: it has to carry the value."""
    for style in load_grammar().styles.values():
        for opening in lexicon().get(style.name, {}).get("openings", []) if style.slots else []:
            assert "{" in opening, f"{style.name}: {opening}"


def test_text_tools():
    assert sentences("Mr. Fox ran. It rained at 3.5 mm. J. Smith left!") == [
        "Mr. Fox ran.",
        "It rained at 3.5 mm.",
        "J. Smith left!",
    ]
    assert names("The old Marta Odell met Pierre. Then Lyon slept.") == ["Marta Odell", "Pierre", "Lyon"]
    assert lower_first("The door") == "the door" and lower_first("Pierre ran") == "Pierre ran"
    assert lower_first("I ran") == "I ran"
    assert fix_articles("a otter and an cat and a hour") == "an otter and a cat and an hour"
    assert swap("Friend, the friend of Friend", "friend=matey", Random(0)) == "Matey, the matey of Friend"
    assert [third_person(verb) for verb in ("carry", "catch", "walk")] == ["carries", "catches", "walks"]
    assert [past_of(verb) for verb in ("carry", "stop", "bake")] == ["carried", "stopped", "baked"]
