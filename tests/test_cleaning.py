"""Cleaning: each rule with rows it must drop and rows that only look like it; lead-ins in the shapes models give them."""

import pandas as pd
import pytest

from promptrec.cleaning import CleaningSettings, clean, is_nonsense, is_refusal, strip_lead_in
from promptrec.data import shipped_triples

BODY = "The ferry, she sails at nine, me boys,\nand the quay is slick with rain."
LEAD_INS = [
    "Sure, here is the text rewritten as a sea shanty:\n\n",
    "Sure, here's the rewritten text:\n\n",
    "Sure! Here’s a pirate version of it:\n\n",
    "Sure. Here's the converted text into a dialogue:\n\n",
    "Sure thing, here's the text rewritten to fit the message in a bottle format:\n\n",
    "Certainly! Here is a more formal version:\n\n",
    "Of course! Here is the underwater version:\n",
    "Okay, here's how a pirate captain might grumble about it:\n\n",
    "Absolutely! Below is the revised email:\n\n",
    "Sure, I can do that. Here is the poem:\n\n",
    "Sure, I have rewritten the text in the voice of a sailor.\n\n",
    "Sure, here's a flirty version 😉\n\n",
    "Sure, please see the rewritten text below:\n\n",
    "Certainly!\n\n",
    "Here is the story in verse:\n\n",
    "Here's the text, but told by the sea: \n\n",
    "Here are the lines as a shanty:\n\n",
    "Well, here's how that might sound at sea:\n\n",
    "Below is the text as a shanty:\n\n",
    "I have rewritten the paragraph as a shanty:\n\n",
    "This is the rewritten text:\n\n",
    "**Sure, here's the shanty:**\n\n",
    "**Rewritten text:**\n\n",
    "**Rewritten Text**\n\n",
    "**Revised version, now set at sea:**\n\n",
    "**Shortened version:**\n",
    "**Output:**\n\n",
    "## Rewritten Text\n\n",
    "## Rewritten in the style of a shanty:\n\n",
    "### Sea shanty version\n\n",
    "**The rejection, in rhyme:**\n\n",
    "**In the manner of Mr. Dickens:**\n\n",
    "**A chapter in the Russian manner**\n\n",
    "Sure, here is the text as a shanty:\n\n**Rewritten text:**\n\n",
    "Sure, here's the answer:\n\nSure, here's the answer:\n\n",
    "\n  Sure, here is the text:\n\n",
]
PLAIN = [
    "Sure as the tide, he came home at nine.\n\nNobody had doubted it.",
    "Sure footing is hard to find on a wet quay: take care.\n\nHold the rail.",
    "Okay, friends, eyes on me! One, two, three! Today we make a cake.\n\nLet's count the spoons.",
    "Of course the ferry was late. It had been late all week, and we knew it.\nWe waited.",
    "Here lies the ferryman.\nHe rowed his last.",
    "Here is where I leave you, she said. The ferry had come.\n\nHe wept.",
    "Here's to the ferry! May she never sink.\n\nCheers, everyone.",
    "This is the ferry that Jack built:\n\nit floats, mostly.",
    "I have a confession to make:\n\nI never liked the sea.",
    "**The Captain Overslept**\n\nOh, we lay on the quay at Piraeus, me boys.",
    "**FADE IN:**\n\n**EXT. QUAY - DAWN**\n\nMist over the water.",
    "**Ingredients:**\n\n- one ferry\n- rain",
    "**What you will need:**\n\n- one ferry\n- rain",
    "**Key points:**\n\n1. The ferry is late.\n2. It rains.",
    "**The First Mate:**\n\nAye!\n\n**The Old Captain:**\n\nNay!",
    "**Day 1:**\n\nWe sailed at nine.",
    "**Subject: Your ferry is late**\n\nDear passenger,",
    "**Fenwick Ferries plc: Annual Results**\n\nA good year for rain.",
    "## The Riots of 1771: revision notes\n\nBread was dear.",
    "# Aunt Fikret's Lentil Soup\n\nSoak the lentils.",
    "Dear Sir,\n\nHere is the list you asked for:\n\n- rope",
    "The ferry leaves at nine.",
    "Certainly",
    "",
]


@pytest.mark.parametrize("lead_in", LEAD_INS)
def test_lead_ins_come_off_and_only_they(lead_in):
    assert strip_lead_in(lead_in + BODY) == BODY


@pytest.mark.parametrize("text", PLAIN)
def test_texts_that_only_begin_alike_stay_whole(text):
    assert strip_lead_in(text) == text


def test_a_lead_in_on_the_line_of_the_text_comes_off():
    assert strip_lead_in("Sure, here's a simpler version: Species go extinct.") == "Species go extinct."


@pytest.mark.parametrize("text", ["Sure, here is the text:", "**Rewritten text:**", "Sure, here it is:\n\n  \n"])
def test_a_text_that_is_nothing_but_a_lead_in_is_left_for_the_other_rules(text):
    assert strip_lead_in(text) == text.strip()


def test_stripping_is_quick_on_a_long_text():
    text = "**The mug speaks, again and again:**\n\n" + "Sure, here is a word and another one. " * 20_000
    assert strip_lead_in(text).startswith("Sure, here is a word")


def test_lead_ins_of_the_shipped_triples_come_off_and_hardly_anything_else():
    triples = shipped_triples()
    touched = triples["rewritten_text"].map(strip_lead_in) != triples["rewritten_text"].str.strip()
    marked = triples["lead_in"].astype(str).eq("True")
    assert marked.sum() >= 30
    assert touched[marked].mean() >= 0.9
    assert touched[~marked].mean() < 0.02


# --- refusals and nonsense


@pytest.mark.parametrize(
    "text",
    [
        "I cannot rewrite this text, because it contains personal data.",
        "I can't help you with that.",
        "I can’t assist with this request.",
        "I'm sorry, but I cannot fulfill this request.",
        "I am sorry, I'm unable to do that.",
        "Sorry, but I can't do that.",
        "I'm unable to provide a rewritten version of this text.",
        "I am not able to generate content of that kind.",
        "I apologize, but I am unable to rewrite the passage.",
        "Unfortunately, I cannot comply with this request.",
        "As an AI language model, I do not have opinions.",
        "The text you provided does not contain any information about the ferry.",
        "The text does not mention a pirate.",
    ],
)
def test_refusals_are_recognised(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "I cannot contemplate without a shudder that cramped and windowless chamber.",
        "I can't believe the ferry left without us!",
        "I can't help falling for this town.",
        "I'm sorry to hear that your ferry was late, Mrs Okoro.",
        "I am so very sorry to write to you with this news.",
        "Sorry, folks, the ferry is cancelled.",
        "Unfortunately, the ferry is late again.",
        "The text of the law is plain: no ferry after nine.",
        "As an airline pilot I have seen many ferries.",
        "He said: I cannot rewrite this.",
        "I apologise for the delay to your crossing.",
    ],
)
def test_apologies_and_complaints_are_no_refusals(text):
    assert not is_refusal(text)


@pytest.mark.parametrize(
    ("text", "nonsense"),
    [
        ("1234 5678 // 90 -- 11:22", True),
        ("........ -- .... a ....", True),
        ("the ferry the ferry " * 20, True),
        ("ha ha " * 5, False),
        (BODY, False),
        ("今日は船が遅れています。", False),
    ],
)
def test_nonsense_is_recognised(text, nonsense):
    assert is_nonsense(text) is nonsense


# --- the whole


def triple(original="The ferry leaves at nine from the old quay.", prompt="Make it a shanty", rewritten=BODY):
    return {"original_text": original, "rewrite_prompt": prompt, "rewritten_text": rewritten}


GOOD = triple()
DROPPED = {
    "blank": [triple(rewritten="  "), triple(prompt=" "), triple(rewritten=None), triple(prompt=float("nan"))],
    "refusal": [triple(rewritten="I'm sorry, but I cannot rewrite this text.")],
    "nonsense": [triple(rewritten="0101 0101 0101 // 0101")],
    "length": [triple(rewritten="Too short"), triple(rewritten=" ".join(f"word{n}" for n in range(601))),
               triple(prompt="Shanty"), triple(prompt="please " * 81)],
    "unchanged": [triple(rewritten="The ferry leaves at nine from the old quay!")],
    "near-duplicate": [triple(prompt="As a sea song", rewritten=BODY + "!")],
}  # fmt: skip


@pytest.mark.parametrize("rule", DROPPED)
def test_each_rule_drops_its_rows_and_counts_them(rule):
    table, report = clean(pd.DataFrame([GOOD, *DROPPED[rule]]))
    assert table.to_dict("records") == [GOOD]
    assert report.drop("lead-in stripped").to_dict() == {name: len(DROPPED[rule]) * (name == rule) for name in DROPPED}


def test_rows_in_are_rows_out_plus_rows_reported():
    given = pd.DataFrame([GOOD, *(row for rows in DROPPED.values() for row in rows)])
    table, report = clean(given)
    assert len(given) == len(table) + report.drop("lead-in stripped").sum()


def test_lead_ins_are_stripped_before_the_other_rules_look():
    rows = [
        triple(rewritten="Sure, here it is:\n\nI'm sorry, but I cannot do that."),
        triple(rewritten=LEAD_INS[0] + BODY),
    ]
    table, report = clean(pd.DataFrame(rows))
    assert table["rewritten_text"].tolist() == [BODY]
    assert (report["lead-in stripped"], report["refusal"]) == (2, 1)


def test_equal_rewrites_of_different_originals_stay():
    table, _ = clean(pd.DataFrame([GOOD, triple(original="Another text altogether, about a bakery.")]))
    assert len(table) == 2


def test_different_rewrites_of_one_original_stay():
    rows = [GOOD, triple(prompt="Make it a telegram", rewritten="FERRY NINE STOP QUAY WET STOP")]
    assert len(clean(pd.DataFrame(rows))[0]) == 2


def test_settings_move_the_limits():
    rows = pd.DataFrame([triple(rewritten="Four words are here"), triple(prompt="Make it a shanty for six old men")])
    assert len(clean(rows, CleaningSettings(shortest_rewrite=5))[0]) == 1
    assert len(clean(rows, CleaningSettings(longest_prompt=7))[0]) == 1
    assert len(clean(rows, CleaningSettings(duplicate=10.0))[0]) == 1


def test_cleaning_twice_changes_nothing():
    once, _ = clean(shipped_triples())
    twice, report = clean(once)
    pd.testing.assert_frame_equal(once, twice)
    assert report.sum() == 0


def test_other_columns_and_the_callers_table_stay_as_they_are():
    given = pd.DataFrame([triple(rewritten=LEAD_INS[0] + BODY)]).assign(id="7", source="x")
    before = given.copy()
    table, _ = clean(given)
    assert table[["id", "source"]].to_dict("records") == [{"id": "7", "source": "x"}]
    pd.testing.assert_frame_equal(given, before)


def test_a_table_in_which_nothing_survives_is_empty_not_an_error():
    table, report = clean(pd.DataFrame(DROPPED["blank"]))
    assert table.empty and report["blank"] == 4
    assert list(table.columns) == list(GOOD)
