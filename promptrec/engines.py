"""The language model that answers, with one adapter: torch's or Keras', under the same names.

Part 3 asks an Engine and need not know which framework is behind it. Loads only; see lora.py and lora_keras.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from promptrec.inference import LanguageModelRecoverer
from promptrec.profiles import Profile


@dataclass(frozen=True)
class Engine:
    """A base model with an adapter that can be switched on and off."""

    model: object
    tokenizer: object
    adapter: object  # what a recoverer's `adapter` is when the adapter is on
    weights: Path  # the adapter's file
    sizes: dict[str, int]  # numbers in each weight, by name; an adapter's name holds "lora_"
    generation: object  # how answers are generated
    kind: type[LanguageModelRecoverer]
    token_ids: Callable[[object, str], list[int]]

    def recoverer(self, name: str, adapted: bool = False, **options: object) -> LanguageModelRecoverer:
        """This model as a recoverer, with the adapter or without; options as LanguageModelRecoverer has them."""
        adapter = self.adapter if adapted else None
        return self.kind(self.model, self.tokenizer, name, adapter=adapter, settings=self.generation, **options)

    def length(self, text: str) -> int:
        """How many tokens the model reads for a text."""
        return len(self.token_ids(self.tokenizer, text))


def load_engine(profile: Profile, adapter: Path, new_tokens: int = 32, batch_size: int = 16, seed: int = 0) -> Engine:
    """The profile's base model with the adapter that Part 2 made under it. Raises InputError where they do not fit."""
    return (_keras if profile.in_keras else _torch)(profile, adapter, new_tokens, batch_size, seed)


def _torch(profile: Profile, adapter: Path, new_tokens: int, batch_size: int, seed: int) -> Engine:
    from promptrec.language_model import GenerationSettings, token_ids
    from promptrec.lora import ADAPTER, load_adapters

    model, tokenizer = load_adapters(profile.base_model, {"recovery": adapter})
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    generation = GenerationSettings(new_tokens, batch_size, seed=seed)
    weights = Path(adapter) / ADAPTER
    return Engine(model, tokenizer, "recovery", weights, sizes, generation, LanguageModelRecoverer, token_ids)


def _keras(profile: Profile, adapter: Path, new_tokens: int, batch_size: int, seed: int) -> Engine:
    from promptrec.lora_keras import KerasRecoverer, adapter_file, use_adapter
    from promptrec.rewriters.keras_gemma import KerasGeneration, load_gemma, token_ids

    weights = adapter_file(adapter)  # said before minutes go into loading the base
    model, tokenizer = load_gemma(profile.base_model)
    use_adapter(model, weights)  # now, so that nothing is compiled for a model without one
    sizes = {weight.path: int(weight.value.size) for weight in model.weights}
    generation = KerasGeneration(new_tokens, batch_size)  # greedy: there is no seed
    return Engine(model, tokenizer, weights, weights, sizes, generation, KerasRecoverer, token_ids)
