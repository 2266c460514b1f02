"""Every text a model sees: chat turns, the rewriting request, the recovery instruction.

One function makes a prompt for training and for test: two copies of a template drift apart, and a model trained
with a newline that it does not see at test time fails quietly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from promptrec.errors import InputError


@dataclass(frozen=True)
class Chat:
    """How one family of chat models marks turns. The tokenizer adds the beginning-of-sequence token itself."""

    before_user: str
    after_user: str  # ends where the model's answer begins
    after_model: str  # what the model is trained to close its answer with


CHATS = {
    "gemma": Chat("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
    "mistral": Chat("[INST] ", " [/INST]", "</s>"),
    "plain": Chat("", "\n", "\n"),
}
RECOVERY_INSTRUCTION = "What instruction turned the original text into the rewritten text?"
REWRITE_WRAPS = (
    "{prompt}:\n{text}",
    "{prompt}\n\n{text}",
    '{prompt}\n"""{text}"""',
)  # the hosts' exact wrap is unknown


def chat_of(family: str) -> Chat:
    """The chat format of a model family. Raises InputError for an unknown one."""
    if family not in CHATS:
        raise InputError(f"chat family {family!r} is unknown; choose one of {', '.join(CHATS)}")
    return CHATS[family]


def user_turn(message: str, family: str = "gemma") -> str:
    """A user's message up to the point where the model's answer begins."""
    chat = chat_of(family)
    return f"{chat.before_user}{message}{chat.after_user}"


def rewrite_request(original_text: str, rewrite_prompt: str, family: str = "gemma", wrap: int = 0) -> str:
    """What the rewriting model was asked: prompt, then text, in one user turn. `wrap` picks how they are joined."""
    return user_turn(REWRITE_WRAPS[wrap].format(prompt=rewrite_prompt, text=original_text), family)


def recovery_request(
    original_text: str, rewritten_text: str, family: str = "gemma", shots: Sequence[tuple[str, str, str]] = ()
) -> str:
    """What the recovering model is asked, with solved examples (original, rewritten, prompt) before it when given."""
    chat = chat_of(family)
    solved = "".join(
        f"{user_turn(_pair(original, rewritten), family)}{prompt}{chat.after_model}\n"
        for original, rewritten, prompt in shots
    )
    return solved + user_turn(_pair(original_text, rewritten_text), family)


def recovery_answer(rewrite_prompt: str, family: str = "gemma") -> str:
    """What the model is trained to answer: the prompt and the mark that ends its turn."""
    return rewrite_prompt + chat_of(family).after_model


def _pair(original_text: str, rewritten_text: str) -> str:
    return f"Original:\n{original_text}\n\nRewritten:\n{rewritten_text}\n\n{RECOVERY_INSTRUCTION}"
