"""A tiny sentence-t5 in both real formats, from the same random weights.

`saved_model`: a TensorFlow SavedModel that tokenises within its graph (SentencePiece + EOS, at most 128 tokens), the
scorer of record. `sentence_transformer`: the folder of modules that sentence-transformers reads (Transformer, Pooling,
Dense, Normalize), its Hugging Face twin. The pieces are learnt from the project's own text.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

PIECES, SENTINELS = 1000, 100  # <extra_id_0> ... are known to the twin's tokenizer only
LAYERS, HEADS, WIDTH, HEAD_WIDTH, INNER, OUTPUT = 2, 4, 32, 8, 64, 24


@dataclass(frozen=True)
class TinyT5:
    saved_model: Path
    sentence_transformer: Path


def build_tiny_t5(folder: Path) -> TinyT5:
    """Write both formats below `folder`."""
    twin = _sentence_transformer(folder)
    _saved_model(twin, folder / "saved-model")
    return TinyT5(folder / "saved-model", twin)


def _vocabulary(folder: Path) -> Path:
    import sentencepiece

    from promptrec.data import shipped_originals
    from promptrec.prompt_bank import shipped_prompts

    texts = [*shipped_prompts()["rewrite_prompt"], *shipped_originals()["text"]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "spiece"), model_type="unigram", vocab_size=PIECES,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return folder / "spiece.model"


def _sentence_transformer(folder: Path) -> Path:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    encoder = folder / "encoder"
    encoder.mkdir(parents=True)
    vocabulary = _vocabulary(encoder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=PIECES + SENTINELS, d_model=WIDTH, d_kv=HEAD_WIDTH, d_ff=INNER, num_layers=LAYERS, num_heads=HEADS,
        feed_forward_proj="relu",
    )  # fmt: skip
    model = T5EncoderModel(config).eval()
    with torch.no_grad():  # fresh weights are so small that every text would look alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(encoder)
    T5Tokenizer.from_pretrained(encoder).save_pretrained(encoder)
    modules = [
        Transformer(str(encoder), max_seq_length=256),
        Pooling(WIDTH, pooling_mode="mean"),
        Dense(WIDTH, OUTPUT, bias=False, activation_function=torch.nn.Identity()),
        Normalize(),
    ]
    twin = folder / "sentence-transformer"
    SentenceTransformer(modules=modules, device="cpu").save(str(twin))
    shutil.copy(vocabulary, twin / "spiece.model")
    return twin


def _saved_model(twin: Path, folder: Path) -> None:
    import tensorflow as tf
    import tensorflow_text
    import torch
    from safetensors.numpy import load_file
    from transformers import T5EncoderModel

    encoder = T5EncoderModel.from_pretrained(twin)
    with torch.no_grad():
        bias = encoder.encoder.block[0].layer[0].SelfAttention.compute_bias(128, 128).numpy()  # [1, heads, 128, 128]
    weights = {name: value.numpy() for name, value in encoder.state_dict().items()}

    class SentenceT5(tf.Module):
        def __init__(self):
            super().__init__()
            pieces = (twin / "spiece.model").read_bytes()
            self.tokenizer = tensorflow_text.SentencepieceTokenizer(pieces, add_eos=True)
            self.weights = {name.replace(".", "_"): tf.Variable(value) for name, value in weights.items()}
            self.dense = tf.Variable(load_file(twin / "2_Dense/model.safetensors")["linear.weight"])
            self.bias = tf.constant(bias)

        def linear(self, x, name):
            return tf.matmul(x, self.weights[name.replace(".", "_") + "_weight"], transpose_b=True)

        def norm(self, x, name):
            scale = self.weights[name.replace(".", "_") + "_weight"]
            return x * tf.math.rsqrt(tf.reduce_mean(x**2, -1, keepdims=True) + 1e-6) * scale

        def heads(self, x):  # [n, t, width] -> [n, heads, t, head width]
            return tf.transpose(tf.reshape(x, [tf.shape(x)[0], tf.shape(x)[1], HEADS, HEAD_WIDTH]), [0, 2, 1, 3])

        def attend(self, x, name, bias):
            q, k, v = (self.heads(self.linear(x, f"{name}.{part}")) for part in "qkv")
            mixed = tf.matmul(tf.nn.softmax(tf.matmul(q, k, transpose_b=True) + bias), v)
            return self.linear(tf.reshape(tf.transpose(mixed, [0, 2, 1, 3]), tf.shape(x)), f"{name}.o")

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="x")])
        def __call__(self, x):
            pieces = self.tokenizer.tokenize(x)  # ragged, EOS last
            cut = tf.concat([pieces[:, :-1][:, :127], pieces[:, -1:]], axis=1)
            mask = tf.sequence_mask(cut.row_lengths(), dtype=tf.float32)  # [n, t]
            hidden = tf.gather(self.weights["shared_weight"], cut.to_tensor(0))  # [n, t, width]
            length = tf.shape(mask)[1]
            bias = self.bias[:, :, :length, :length] + (1 - mask[:, None, None, :]) * -1e9
            for block in range(LAYERS):
                at = f"encoder.block.{block}.layer"
                hidden += self.attend(self.norm(hidden, f"{at}.0.layer_norm"), f"{at}.0.SelfAttention", bias)
                inner = self.linear(self.norm(hidden, f"{at}.1.layer_norm"), f"{at}.1.DenseReluDense.wi")
                hidden += self.linear(tf.nn.relu(inner), f"{at}.1.DenseReluDense.wo")
            hidden = self.norm(hidden, "encoder.final_layer_norm")
            pooled = tf.reduce_sum(hidden * mask[..., None], 1) / tf.reduce_sum(mask, 1, keepdims=True)
            return [tf.math.l2_normalize(tf.matmul(pooled, self.dense, transpose_b=True), axis=-1)]

    tf.saved_model.save(SentenceT5(), str(folder))
