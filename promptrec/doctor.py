"""What is here: the profile, the devices, the versions, what is attached."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from promptrec.profiles import Profile, describe, detect, from_hub, missing_inputs
from promptrec.tables import versions


def devices() -> str:
    """Cores, memory and accelerators in one line. Torch is asked for cards if it is installed; JAX, which would take a TPU
    for itself, is not asked."""
    parts = [f"{os.cpu_count()} CPU cores", f"{_memory_gib():.0f} GiB memory"]
    if detect() == "kaggle-tpu":
        parts.append("a TPU")
    try:
        import torch
    except ImportError:
        return ", ".join(parts)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        parts.append(
            f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB, capability {properties.major}.{properties.minor})"
        )
    return ", ".join(parts)


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def report(profile: Profile) -> str:
    """A page of text: profile, devices, versions, free disk, artefacts present, inputs missing."""
    out = Path(profile.out)
    artefacts = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    free = shutil.disk_usage(out if out.is_dir() else ".").free / 2**30
    return "\n".join(
        [
            describe(profile),
            "",
            f"devices    {devices()}",
            f"free disk  {free:.0f} GiB",
            f"versions   {', '.join(f'{name} {version}' for name, version in versions().items())}",
            f"artefacts  {', '.join(artefacts) or 'none yet'}",
            *[
                f"fetched    {name}, from the Hugging Face hub when it is needed; not checked"
                for name in from_hub(profile)
            ],
            f"missing    {'; '.join(missing_inputs(profile)) or 'nothing'}",
        ]
    )
