"""Gemma in Keras on JAX as the rewriter: the TPU path, weights sharded over however many devices there are.

KERAS_BACKEND=jax must be set before Keras is imported; profiles.activate() does that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from promptrec.errors import InputError
from promptrec.profiles import attach_hint
from promptrec.templates import REWRITE_WRAPS, chat_of, rewrite_request

BUCKETS = (128, 256, 512, 1024)  # lengths (tokens) to which a batch is padded: one compilation each


def shard_over_devices():
    """Spread every weight matrix over a mesh (1, devices): keras.distribution.ModelParallel, set as the default.

    Gemma's own layout map splits query/key/value and the feed-forward columns over the "model" axis. Models with
    fewer key/value heads than devices get no split of key and value, which would not divide.
    """
    import keras
    import keras_hub

    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
    layout = keras_hub.models.GemmaBackbone.get_layout_map(mesh)
    distribution = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    keras.distribution.set_distribution(distribution)
    return distribution


@dataclass
class KerasGemmaRewriter:
    """Rewrites with keras_hub's GemmaCausalLM from a local preset directory (Keras preset or Hugging Face folder)."""

    path: str
    seed: int = 0
    max_new_tokens: int = 384
    batch_size: int = 16
    shard: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        directory = Path(self.path)
        if not (directory / "config.json").is_file():
            hint = attach_hint(self.path, "check the path")
            raise InputError(f"{self.path}: no Gemma preset there (config.json is missing); {hint}")
        import keras
        import keras_hub

        self.name = self.name or f"keras:{directory.name}"
        keras.utils.set_random_seed(self.seed)
        if self.shard and len(keras.distribution.list_devices()) > 1:
            shard_over_devices()
        self.model = keras_hub.models.GemmaCausalLM.from_preset(self.path)
        self.model.compile(sampler="greedy")

    def rewrite(self, originals: list[str], prompts: list[str]) -> list[str]:
        """One rewritten text per pair; batches share a length bucket, so JAX compiles once per bucket."""
        requests = [
            rewrite_request(original, prompt, wrap=len(original + prompt) % len(REWRITE_WRAPS))
            for original, prompt in zip(originals, prompts, strict=True)
        ]
        lengths = [len(ids) for ids in self._token_ids(requests)]
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda row: lengths[row])
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            texts = self._generate([requests[row] for row in rows], max(lengths[row] for row in rows))
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
        return answers

    def _generate(self, requests: list[str], longest: int) -> list[str]:
        bucket = next((size for size in BUCKETS if size >= longest), longest)
        padded = requests + [requests[-1]] * (self.batch_size - len(requests))  # one batch shape only
        end = chat_of("gemma").after_model
        outputs = self.model.generate(
            padded, max_length=bucket + self.max_new_tokens, strip_prompt=True, stop_token_ids=self._stop_ids(end)
        )
        return [self._first_tokens(text.split(end)[0]) for text in outputs[: len(requests)]]

    def _first_tokens(self, text: str) -> str:
        """At most max_new_tokens of an answer: Keras counts from the bucket's end, so short requests get more."""
        tokenizer = self.model.preprocessor.tokenizer
        ids = [int(token) for token in tokenizer(text)]
        if len(ids) > self.max_new_tokens:
            text = tokenizer.detokenize([ids[: self.max_new_tokens]])[0]
        return text.strip()

    def _stop_ids(self, end: str) -> list[int]:
        tokenizer = self.model.preprocessor.tokenizer
        return [tokenizer.end_token_id, tokenizer.token_to_id(end)]

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        return [list(self.model.preprocessor.tokenizer(text)) for text in texts]
