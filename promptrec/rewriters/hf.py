"""Gemma (or any other causal LM) in torch as the rewriter: NF4 weights over the GPUs there are, sorted batches."""

from __future__ import annotations

from dataclasses import dataclass

from promptrec.language_model import GenerationSettings, generate, load_model, load_tokenizer
from promptrec.profiles import model_name, override
from promptrec.templates import REWRITE_WRAPS, chat_of, rewrite_request

REWRITES = GenerationSettings(max_new_tokens=384, batch_size=16)


@dataclass
class HuggingFaceRewriter:
    """Rewrites with a chat model from a local directory (or, online, a hub name)."""

    path: str
    chat: str = "gemma"
    seed: int = 0
    quantise: bool = True
    settings: GenerationSettings | None = None
    name: str = ""

    def __post_init__(self) -> None:
        self.settings = self.settings or override(REWRITES, seed=self.seed)
        self.name = self.name or f"hf:{model_name(self.path)}"
        self.tokenizer = load_tokenizer(self.path)
        self.model = load_model(self.path, self.quantise)

    def rewrite(self, originals: list[str], prompts: list[str]) -> list[str]:
        """One rewritten text per pair. The way prompt and text are joined varies by row: the hosts' is unknown."""
        requests = [
            rewrite_request(original, prompt, self.chat, wrap=len(original + prompt) % len(REWRITE_WRAPS))
            for original, prompt in zip(originals, prompts, strict=True)
        ]
        return generate(
            self.model,
            self.tokenizer,
            requests,
            self.settings,
            stop=chat_of(self.chat).after_model,
            description=self.name,
        )
