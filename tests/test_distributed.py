"""Several processes as one run: real ones, on the CPU over gloo, started by torchrun, killed and resumed.

The number of processes is never taken from what a command prints alone: each leaves files or a process id of its own.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pandas as pd
import psutil
import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from test_finetuning import write_triples

from promptrec import distributed
from promptrec.errors import InputError
from promptrec.inference import predict_shared
from promptrec.profiles import get_profile
from promptrec.prompt_bank import grammar_prompts
from promptrec.rewriters.rules import RulesRewriter
from promptrec.rewriting import rewrite_table
from promptrec.tables import append_jsonl, read_jsonl, read_table, write_table

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WORKER = str(Path(__file__).with_name("distributed_worker.py"))
SETTINGS = {
    "LoraSettings.rank": 2,
    "LoraSettings.dropout": 0.0,  # its masks differ between processes
    "LoraSettings.batch_size": 4,
    "LoraSettings.evaluate_every": 1,
    "LoraSettings.learning_rate": 1e-3,
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """This process is no launcher's, whatever started the tests."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)


def launch(processes: int, *command: object, accelerate: bool = False, **environment: str) -> subprocess.Popen:
    """torchrun, or accelerate launch, with so many processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    if accelerate:
        run = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp.yaml")]
        run += ["--num_processes", str(processes), "--main_process_port", "0"]
    return subprocess.Popen(
        [*run, *map(str, command)],
        env=os.environ | {"PROMPTREC_PROFILE": "local", "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(run: subprocess.Popen) -> str:
    out, err = run.communicate(timeout=600)
    assert run.returncode == 0, err[:5000]
    return out


# --- one process by itself


@pytest.mark.parametrize(("rows", "count"), [(40, 2), (40, 3), (5, 8), (1, 2)])
def test_shares_cover_every_row_once_and_depend_on_ids_alone(rows, count):
    table = pd.DataFrame({"id": [f"r{n}" for n in range(rows)]})
    shares = [distributed.share(table, index, count)["id"].tolist() for index in range(count)]
    assert sorted(chain(*shares)) == sorted(table["id"])
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    shuffled = table.sample(frac=1, random_state=1)
    assert [set(distributed.share(shuffled, index, count)["id"]) for index in range(count)] == [*map(set, shares)]
    assert all(one == [row for row in table["id"] if row in one] for one in shares)  # in the order of the table


def test_a_run_without_a_launcher_is_one_process(tmp_path):
    assert (distributed.world(), distributed.rank(), distributed.first()) == (1, 0, True)
    assert distributed.join() is None and distributed.gather([1, 2]) == [1, 2]
    assert distributed.from_first(lambda: "made") == "made"
    assert distributed.own_file(tmp_path / "log.jsonl") == tmp_path / "log.jsonl"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
    ],
)
def test_half_a_launcher_is_refused(cli, monkeypatch, environment, reason):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, _, err = cli("rewrite", "in.csv", "--out", "out.jsonl")
    assert code == 2 and reason in err and err.count("\n") == 1


def test_a_shard_by_hand_and_a_keras_profile_are_refused_under_a_launcher(cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = cli("recover", "in.csv", "--out", "out.csv", "--profile", "kaggle-tpu")
    assert code == 2 and "one process drives all devices in Keras" in err
    code, _, err = cli("rewrite", "in.csv", "--out", "out.jsonl", "--shard", "0/2")
    assert code == 2 and "the processes of torchrun share the rows by themselves" in err


def test_a_merge_that_was_killed_half_way_is_done_again_without_doubling(tmp_path):
    log = tmp_path / "log[1].jsonl"  # a name that a pattern would misread
    for name, ids in ((log.name, "ab"), (f"{log.name}.part-0.jsonl", "ca"), (f"{log.name}.part-11.jsonl", "dx")):
        append_jsonl(tmp_path / name, [{"id": one, "text": one * 2} for one in ids])
    with open(tmp_path / f"{log.name}.part-0.jsonl", "ab") as part:
        part.write(b'{"id": "torn", "te')
    distributed.merge_logs(log, ["d", "c", "b", "a"])
    assert [row["id"] for row in read_jsonl(log)] == ["d", "c", "b", "a", "x"]
    assert all(row["text"] == row["id"] * 2 for row in read_jsonl(log)) and [*tmp_path.iterdir()] == [log]


@pytest.mark.parametrize(
    ("name", "way"), [("ddp.yaml", "multi_gpu"), ("fsdp.yaml", "use_fsdp"), ("zero2.yaml", "use_deepspeed")]
)
def test_accelerate_takes_the_configurations(name, way):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    command = ["--config_file", str(CONFIGS / name), "--num_processes", "8", "--module", "promptrec"]
    parsed = _validate_launch_command(launch_command_parser().parse_args(command))[0]
    assert parsed.num_processes == 8 and parsed.num_machines == 1 and not parsed.use_cpu
    assert [one for one in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(parsed, one)] == [way]
    if way == "use_fsdp":
        assert str(parsed.fsdp_version) == "2" and parsed.fsdp_state_dict_type == "FULL_STATE_DICT"
    if way == "use_deepspeed":
        assert (CONFIGS.parent / parsed.deepspeed_config_file).is_file()


def test_zero2_leaves_the_numbers_to_the_trainer():
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    config = HfDeepSpeedConfig(str(CONFIGS / "zero2.json"))
    assert config.is_zero2() and not config.is_offload()
    for name in (
        "gradient_accumulation_steps",
        "train_micro_batch_size_per_gpu",
        "train_batch_size",
        "gradient_clipping",
    ):
        assert config.get_value(name) == "auto"  # else it would contradict the settings


def test_4_bit_values_are_stored_as_floats_for_fsdp_alone(monkeypatch):
    import torch

    from promptrec.language_model import compute_dtype, nf4_config

    assert nf4_config().bnb_4bit_quant_storage == torch.uint8
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert nf4_config().bnb_4bit_quant_storage == compute_dtype()


# --- rewriting


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    prompts = grammar_prompts(40, seed=0)["rewrite_prompt"].tolist() * 50
    rows = pd.DataFrame({"id": [f"r{n}" for n in range(len(prompts))], "rewrite_prompt": prompts})
    rows["original_text"] = [f"The ferry number {n} leaves at nine. Bring a coat." for n in range(len(rows))]
    return write_table(rows, tmp_path_factory.mktemp("rows") / "in.csv")


@pytest.fixture(scope="module")
def killed(table) -> Path:
    """The log of a run of two processes that were all killed (SIGKILL) when both had written rows."""
    log = table.with_name("killed.jsonl")
    run = launch(2, "-m", "promptrec", "rewrite", table, "--out", log, "--batch-size", "1")
    deadline = time.monotonic() + 600
    under_way = lambda: [part for part in distributed.part_files(log) if part.stat().st_size > 2000]  # noqa: E731
    while len(under_way()) < 2 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    launcher = psutil.Process(run.pid)
    for process in (launcher, *launcher.children(recursive=True)):  # torchrun's processes do not die with it
        process.kill()
    run.communicate()
    return log


def ids_in(log: Path) -> list[str]:
    return [row["id"] for row in read_jsonl(log, tolerate_torn_tail=True)]


def check_whole(log: Path, table: Path) -> None:
    """Every row once, in the order of the table, as one process would have rewritten it; no part is left."""
    rows = read_table(table)
    assert ids_in(log) == rows["id"].tolist() and not distributed.part_files(log)
    expected = RulesRewriter().rewrite(rows["original_text"].tolist(), rows["rewrite_prompt"].tolist())
    assert [row["rewritten_text"] for row in read_jsonl(log)] == expected


def test_two_killed_processes_wrote_rows_of_their_own(killed, table):
    parts = [ids_in(part) for part in distributed.part_files(killed)]
    ids = [*chain(*parts)]
    assert len(parts) == 2 and all(parts) and not killed.exists()
    assert len(ids) == len(set(ids)) < len(read_table(table))


def test_a_killed_run_is_finished_by_three_processes(killed, table, tmp_path):
    for part in distributed.part_files(killed):
        shutil.copy(part, tmp_path)
    log = tmp_path / killed.name
    printed = finished(launch(3, "--module", "promptrec", "rewrite", table, "--out", log, accelerate=True))
    assert printed == f"2000 of 2000 rows are rewritten in {log} by 3 processes\n"  # once, not three times
    check_whole(log, table)


def test_a_killed_run_is_finished_by_one_process(killed, table, tmp_path):
    for part in distributed.part_files(killed):
        shutil.copy(part, tmp_path)
    done = rewrite_table(read_table(table), RulesRewriter(), tmp_path / killed.name)
    assert len(done) == 2000
    check_whole(tmp_path / killed.name, table)


def test_a_part_of_another_run_is_refused(killed, table, tmp_path):
    for part in distributed.part_files(killed):
        shutil.copy(part, tmp_path)
    other = read_table(table).assign(rewrite_prompt=grammar_prompts(41, seed=1)["rewrite_prompt"].iloc[-1])
    with pytest.raises(InputError, match=r"part-0.jsonl: id 'r\d+' was rewritten with another rewrite_prompt"):
        rewrite_table(other, RulesRewriter(), tmp_path / killed.name)


# --- recovering


def test_one_killed_process_ends_the_others_and_the_rest_is_answered_by_one(tmp_path):
    rows = pd.DataFrame({"id": [f"r{n}" for n in range(40)], "original_text": [f"the ferry {n}" for n in range(40)]})
    source = write_table(rows.assign(rewritten_text="Ahoy!"), tmp_path / "in.csv")
    out, started = tmp_path / "out.csv", time.monotonic()
    run = launch(2, WORKER, "recover", source, out)
    run.communicate(timeout=600)
    assert run.returncode != 0 and time.monotonic() - started < 600  # the first one waits for the second, not for long
    first, second = (len(ids_in(part)) for part in distributed.part_files(out))
    assert 6 <= first <= 20 and second == 6  # torchrun ends the first one, wherever it is

    class Asked:
        name = "shouter"

        def recover(self, table):
            self.rows = table["id"].tolist()
            return table["original_text"].str.upper().tolist()

    asked, table = Asked(), read_table(source)
    with pytest.raises(InputError, match=r"id 'r\d+' was answered with another run"):
        predict_shared(asked, table, out, "another run")
    predictions = predict_shared(asked, table, out, "run")
    assert len(asked.rows) == 40 - first - second
    assert predictions["id"].tolist() == table["id"].tolist() and set(predictions["method"]) == {"shouter"}
    assert predictions["rewrite_prompt"].tolist() == table["original_text"].str.upper().tolist()


# --- fine-tuning


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A folder with `two`: killed when it had its first checkpoint, finished by two processes; `killed`: its first part."""
    folder = tmp_path_factory.mktemp("tuned")
    triples = write_triples(
        folder / "triples.csv", prompt_cluster=range(12), split=["train"] * 8 + ["validation"] * 4, id=range(12)
    )
    environment = {"PROMPTREC_SETTINGS": json.dumps(SETTINGS)}
    run = launch(2, WORKER, "finetune", triples, folder / "two", "dies", **environment)
    assert run.communicate(timeout=600) and run.returncode != 0
    shutil.copytree(folder / "two", folder / "killed")
    for seen in folder.glob("seen-*"):
        seen.unlink()
    printed = finished(launch(2, WORKER, "finetune", triples, folder / "two", **environment))
    (folder / "printed.txt").write_text(printed)
    return folder


def same_adapter(one: Path, other: Path, tolerance: float = 1e-5) -> bool:
    one, other = (load_file(path) for path in (one, other))
    return one.keys() == other.keys() and all((one[name] - other[name]).abs().max().item() <= tolerance for name in one)


def test_two_processes_hold_the_same_adapter_and_the_same_score(tuned):
    seen = [sorted(tuned.glob(f"seen-{number}-of-*")) for number in (1, 2, 3)]
    assert [len({path.name.split("-")[3] for path in paths}) for paths in seen] == [2, 2, 2]  # two process ids
    for one, other in seen:
        assert same_adapter(one, other, tolerance=0.0)
        scores = []
        for path in (one, other):
            with safe_open(path, "pt") as file:
                scores.append(file.metadata()["scs"])
        assert scores[0] == scores[1]
    assert not same_adapter(seen[0][0], seen[2][0], tolerance=1e-4)


def test_two_processes_end_where_one_ends(tuned, monkeypatch):
    """Both go on from the killed run: also a test of resuming with another number of processes."""
    from promptrec.finetuning import finetune_file
    from promptrec.sft_trainer import last_checkpoint

    assert last_checkpoint(tuned / "killed" / "checkpoints").endswith("checkpoint-1")
    monkeypatch.setenv("PROMPTREC_SETTINGS", json.dumps(SETTINGS))
    alone = finetune_file(tuned / "triples.csv", tuned / "killed", get_profile("local"), steps=4)
    two = pd.read_csv(tuned / "two" / "history.csv")
    assert two["step"].tolist() == alone["step"].tolist() == [1, 2, 3, 4]
    assert two["loss"].tolist() == pytest.approx(alone["loss"].tolist(), rel=1e-5)
    last = "checkpoints/checkpoint-4/adapter_model.safetensors"
    assert same_adapter(tuned / "killed" / last, tuned / "two" / last)


def test_one_process_writes_and_prints(tuned):
    lines = (tuned / "printed.txt").read_text().splitlines()
    assert len(lines) == 2 and all(line.endswith("by 2 processes") for line in lines)
    manifest = json.loads((tuned / "two.manifest.json").read_text())
    assert manifest["config"]["processes"] == 2 and manifest["rows"] == 8


def test_two_processes_answer_with_the_adapter(tuned):
    predictions = read_table(tuned / "predictions.csv")
    assert predictions["id"].tolist() == [str(n) for n in range(12)] and set(predictions["method"]) == {"fine-tuned"}
    assert predictions["rewrite_prompt"].str.strip().ne("").all() and not distributed.part_files(
        tuned / "predictions.csv"
    )
