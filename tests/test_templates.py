"""Texts that models see: train and test requests are one and the same, shots stand before, families are known."""

import pytest

from promptrec.errors import InputError
from promptrec.templates import (
    CHATS,
    RECOVERY_INSTRUCTION,
    REWRITE_WRAPS,
    chat_of,
    recovery_answer,
    recovery_request,
    rewrite_request,
    user_turn,
)

PAIR = ("The ferry leaves at nine.", "Oh, she sails at nine, boys!")
SHOT = ("The bakery is shut.", "BAKERY SHUT STOP", "Make it a telegram")


def test_gemma_turns_are_as_the_model_was_trained():
    assert rewrite_request("The text.", "Make it rhyme", "gemma") == (
        "<start_of_turn>user\nMake it rhyme:\nThe text.<end_of_turn>\n<start_of_turn>model\n"
    )
    assert recovery_answer("Make it rhyme", "gemma") == "Make it rhyme<end_of_turn>"


def test_mistral_turns_are_as_the_model_was_trained():
    assert user_turn("Hello", "mistral") == "[INST] Hello [/INST]"
    assert recovery_answer("Make it rhyme", "mistral") == "Make it rhyme</s>"


@pytest.mark.parametrize("family", CHATS)
def test_a_training_text_is_the_test_request_plus_the_answer(family):
    request, answer = recovery_request(*PAIR, family), recovery_answer("Make it a shanty", family)
    shot = recovery_request("a", "b", family, shots=[(*PAIR, "Make it a shanty")])
    assert shot.startswith(request + answer)  # the solved example is what training shows, to the letter
    assert shot.endswith(recovery_request("a", "b", family))


@pytest.mark.parametrize("family", CHATS)
def test_a_request_holds_both_texts_in_order_and_ends_where_the_answer_begins(family):
    request = recovery_request(*PAIR, family)
    assert request.index(PAIR[0]) < request.index(PAIR[1]) < request.index(RECOVERY_INSTRUCTION)
    assert request.endswith(chat_of(family).after_user)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_shots_stand_before_the_question_each_with_its_answer(count):
    request = recovery_request(*PAIR, "gemma", shots=[SHOT] * count)
    assert request.count(RECOVERY_INSTRUCTION) == count + 1
    assert request.count("Make it a telegram<end_of_turn>\n") == count
    assert request.count("<start_of_turn>user") == request.count("<start_of_turn>model") == count + 1


@pytest.mark.parametrize("wrap", range(len(REWRITE_WRAPS)))
def test_every_wrap_holds_prompt_then_text_literally(wrap):
    request = rewrite_request("Text with {braces} and {text}", "Use {prompt} 100%", wrap=wrap)
    assert request.index("Use {prompt} 100%") < request.index("Text with {braces} and {text}")
    assert len({rewrite_request("t", "p", wrap=other) for other in range(len(REWRITE_WRAPS))}) == len(REWRITE_WRAPS)


@pytest.mark.parametrize("make", [lambda f: user_turn("x", f), lambda f: recovery_request("a", "b", f),
                                  lambda f: recovery_answer("x", f), lambda f: rewrite_request("a", "b", f)])  # fmt: skip
def test_an_unknown_family_is_refused_with_the_known_ones(make):
    with pytest.raises(InputError, match="chat family 'llama' is unknown; choose one of gemma, mistral, plain"):
        make("llama")
