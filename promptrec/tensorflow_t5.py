"""sentence-t5 as a TensorFlow SavedModel: called in this process, or in one of its own.

Own process: TensorFlow beside torch or JAX on one accelerator means two runtimes that both want all of its memory. The
worker sees no accelerator. It is asked over its standard input (one JSON line a batch) and answers on its standard
output (one JSON line, then an array in NumPy's format); nothing is pickled. It ends when its input ends.

Knows neither scores nor profiles: see scoring.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from promptrec.errors import InputError
from promptrec.profiles import attach_hint

Encoder = Callable[[list[str]], np.ndarray]
NO_ACCELERATOR = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


def load_encoder(model: str | Path) -> Encoder:
    """function(texts) -> float32 [n, d] for a SavedModel directory or a TF-Hub handle, where it disturbs nobody."""
    return WorkerEncoder(model) if wants_own_process() else SavedModelEncoder(model)


def wants_own_process() -> bool:
    """PROMPTREC_SCORER_PROCESS (1 or 0) decides; without it, whether torch or JAX holds an accelerator here."""
    asked = os.environ.get("PROMPTREC_SCORER_PROCESS", "")
    return asked == "1" or (asked != "0" and accelerator_in_use())


def accelerator_in_use() -> bool:
    """Whether torch has begun to use a GPU, or JAX computes on a GPU or TPU, in this process. Imports neither."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    return bool(torch and torch.cuda.is_initialized()) or bool(jax and jax.default_backend() != "cpu")


class SavedModelEncoder:
    """The model in this process, on the CPU.

    Called on a 1-D string tensor it returns a one-element list; element 0 is float [n, 768], unit norm.
    """

    def __init__(self, model: str | Path) -> None:
        import tensorflow as tf
        import tensorflow_text  # noqa: F401  registers the SentencePiece ops inside the graph

        self._tf, self._model = tf, model
        with contextlib.suppress(RuntimeError):  # too late where TensorFlow runs already: Keras tokenises with it
            tf.config.set_visible_devices([], "GPU")  # the language model needs the accelerators
        with tf.device("CPU:0"):
            self._call = self._load()

    def _load(self):
        if Path(self._model).is_dir():
            return _load_saved_model(self._tf, self._model)
        if str(self._model).startswith(("/", ".", "~")):
            hint = attach_hint(self._model, "attach the sentence-t5 st5-base SavedModel there")
            raise InputError(f"{self._model}: no such directory; {hint}")
        import tensorflow_hub

        return tensorflow_hub.load(str(self._model))

    def __call__(self, texts: list[str]) -> np.ndarray:
        try:
            with self._tf.device("CPU:0"):
                output = self._call(self._tf.constant(texts))
        except (TypeError, ValueError, self._tf.errors.OpError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{self._model}: cannot be called on strings ({reason}); is this sentence-t5?") from None
        vectors = output[0] if isinstance(output, list | tuple) and output else output
        shape = getattr(vectors, "shape", None)
        if shape is None or len(shape) != 2 or shape[0] != len(texts):
            raise InputError(
                f"{self._model}: returned {'no tensor' if shape is None else f'shape {tuple(shape)}'} for {len(texts)} "
                f"texts; expected [{len(texts)}, 768]: is this sentence-t5?"
            )
        return vectors.numpy()


def _load_saved_model(tf, directory: str | Path):
    try:
        model = tf.saved_model.load(str(directory))
    except (OSError, tf.errors.OpError) as error:
        raise InputError(f"{directory}: not a TensorFlow SavedModel ({str(error).splitlines()[0][:120]})") from None
    if not callable(model):
        raise InputError(f"{directory}: this SavedModel cannot be called on strings; expected sentence-t5 st5-base")
    return model


class WorkerEncoder:
    """The same model in a process of its own; what it refuses is refused here, with the same line."""

    def __init__(self, model: str | Path) -> None:
        self._model, self._errors = model, tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the worker
        self._start()

    def _start(self) -> None:
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "promptrec.tensorflow_t5", str(self._model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | NO_ACCELERATOR | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for the process that asks
        )
        self.close = weakref.finalize(self, _end, self.process)
        self._answer()  # the model is loaded, or the reason why not

    def __call__(self, texts: list[str]) -> np.ndarray:
        if self.process is None:
            self._start()
        try:
            _send(self.process.stdin, texts=texts)
            return self._answer()
        except BrokenPipeError:
            raise self._ended() from None
        except KeyboardInterrupt:  # an answer still to come must not be taken for that of the next batch
            self.process.kill()
            self.close()
            self.process = None
            raise

    def _answer(self) -> np.ndarray | None:
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(answer["error"])
        payload = self.process.stdout.read(answer["bytes"])
        if len(payload) < answer["bytes"]:
            raise self._ended()
        return np.load(io.BytesIO(payload), allow_pickle=False) if payload else None

    def _ended(self) -> InputError:
        """What there is to say of a worker that died: its exit code and the last line it wrote."""
        code = self.process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return InputError(f"{self._model}: the scorer's process ended with code {code} ({last[:160]})")


def _end(process: subprocess.Popen) -> None:
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            stream.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()


def serve(model: str, requests: BinaryIO, answers: BinaryIO) -> None:
    """The worker: load the model, then answer batches of texts until there are no more; a refusal is an answer too."""
    try:
        encoder = SavedModelEncoder(model)
    except InputError as error:
        return _send(answers, error=str(error))
    _send(answers)
    for line in requests:
        try:
            _send(answers, _as_bytes(encoder(json.loads(line)["texts"])))
        except InputError as error:
            _send(answers, error=str(error))


def _send(stream: BinaryIO, payload: bytes = b"", **message: object) -> None:
    """One JSON line and, behind it, as many bytes as the line says."""
    stream.write(json.dumps({"bytes": len(payload), **message}).encode() + b"\n" + payload)
    stream.flush()


def _as_bytes(vectors: np.ndarray) -> bytes:
    array = io.BytesIO()
    np.save(array, vectors, allow_pickle=False)
    return array.getvalue()


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    serve(sys.argv[1], sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
