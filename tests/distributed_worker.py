"""What torchrun starts in test_distributed.py: the real commands and functions, watched or killed at a known moment."""

import os
import signal
import sys
from pathlib import Path

import pandas as pd

from promptrec import cli, distributed, finetuning, inference


def finetune(table: str, out: str, dies: str = "") -> None:
    """`promptrec finetune`, 4 steps, then `promptrec recover`; each process writes its adapter at every evaluation.

    With `dies`, the first process is killed at its second evaluation, before that checkpoint is written.
    """
    from safetensors.torch import save_file

    held_out_scs, seen = finetuning.held_out_scs, []

    def watched(*arguments, **options):
        measure = held_out_scs(*arguments, **options)

        def measured(model, tokenizer) -> float:
            score = measure(model, tokenizer)
            seen.append(score)
            adapter = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
            name = f"{len(seen)}-of-{os.getpid()}-rank-{distributed.rank()}.safetensors"
            save_file(adapter, Path(out).with_name(f"seen-{name}"), metadata={"scs": repr(score)})
            if dies and len(seen) == 2 and distributed.first():
                os.kill(os.getpid(), signal.SIGKILL)
            return score

        return measured

    finetuning.held_out_scs = watched
    cli.app(["finetune", table, "--out", out, "--steps", "4"], standalone_mode=False)
    predictions = str(Path(out).with_name("predictions.csv"))
    options = ["--out", predictions, "--method", "fine-tuned", "--adapter", out]
    cli.app(["recover", table, *options], standalone_mode=False)
    distributed.leave()


class Shouter:
    """Answers with the original in capitals; the second process is killed when both have answered two batches."""

    name = "shouter"
    batches = 0

    def recover(self, table: pd.DataFrame) -> list[str]:
        self.batches += 1
        if self.batches == 3:
            distributed.barrier()
            if distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return table["original_text"].str.upper().tolist()


def recover(table: str, out: str) -> None:
    """predict_shared with a method that kills the second process."""
    inference.predict_shared(Shouter(), pd.read_csv(table, dtype=str), out, "run", rows=3)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
