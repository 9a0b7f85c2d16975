"""`examples/train_glue.py` on real data with a tiny network; several processes where the point is processes."""

from __future__ import annotations

import json
import math
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import train_glue
from accelerate.commands.launch import launch_command_parser
from commands import printed
from data_dir import data_dir
from scripts import BIN, ROOT, launch
from torch.distributed.run import get_args_parser
from transformers import BertConfig

import hf_lottalora

SCRIPT = str(ROOT / "examples" / "train_glue.py")
Train = Callable[..., dict[str, Any]]

# Parameters of the tiny network with adapters of rank 2.
EMBEDDINGS = (30_522 + 48 + 2) * 32
NORMS = (1 + 2 * 2) * 2 * 32
CLASSIFIER = 2 * 32 + 2
ADAPTERS = 2 * 4 * 2 * 2 * 32
BETAS = 2 * 4


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("architecture")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertConfig(**sizes, max_position_embeddings=48).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def common(architecture: str, cache: str) -> list[str]:
    """Arguments of every run: the tiny network, 64 rows each, two epochs of 4 steps."""
    tokenizer = data_dir() / "tokenizers" / "bert-base-uncased"
    arguments = f"--config_name {architecture} --tokenizer_name {tokenizer} --cache_dir {cache} --max_seq_length 48"
    arguments += " --max_train_samples 64 --max_eval_samples 64 --per_device_train_batch_size 16 --num_train_epochs 2"
    arguments += " --learning_rate 1e-3 --logging_steps 1 --use_cpu --disable_tqdm True"
    return arguments.split()


def rte() -> list[str]:
    return ["--task_name", "rte", "--data_dir", str(data_dir() / "glue"), "--do_train", "--do_eval"]


@pytest.fixture
def train(common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run the script in this process; returns its results and the log history."""

    def run(*arguments: str, output: str = "out") -> dict[str, Any]:
        folder = tmp_path / output
        monkeypatch.setattr(sys, "argv", [SCRIPT, *common, *arguments, "--output_dir", str(folder)])
        train_glue.main()
        results = json.loads((folder / "all_results.json").read_text())
        state = json.loads((folder / "trainer_state.json").read_text())
        return {**results, "folder": folder, "state": state, "losses": losses(state)}

    return run


def losses(state: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


# ---- commands as they are printed -----------------------------------------------------------------------------------


@pytest.fixture
def as_printed(architecture: str, cache: str, tmp_path: Path) -> Callable[[str], list[str]]:
    """The words of a printed command, but for names on the hub, its data, and how much of it."""
    data, few = data_dir(), "--max_train_samples 64 --max_eval_samples 64 --num_train_epochs 1 --max_seq_length 48"
    substitutions = {
        "python ": f"{sys.executable} ",
        "torchrun ": f"{BIN}/torchrun ",
        "accelerate ": f"{BIN}/accelerate ",
        "--config_name google-bert/bert-base-uncased": f"--config_name {architecture}",
        "--tokenizer_name google-bert/bert-base-uncased": f"--tokenizer_name {data}/tokenizers/bert-base-uncased",
        "--task_name sst2": f"--task_name sst2 --data_dir {data}/glue --cache_dir {cache} {few} --disable_tqdm True",
        "--output_dir out/sst2": f"--output_dir {tmp_path}/out",
    }

    def substituted(command: str) -> list[str]:
        for text, other in substitutions.items():
            command = command.replace(text, other)
        return shlex.split(command)

    return substituted


def train_glue_commands() -> list[tuple[str, str]]:
    """Commands of this script and where they are printed; "..." stands for the arguments of the first one there."""
    found = []
    for name, commands in printed().items():
        ours = [command for command in commands if "examples/train_glue.py" in command]
        arguments = ours[0].partition("examples/train_glue.py ")[2] if ours else ""
        found += [(name, command.replace("...", arguments)) for command in ours]
    return found


def test_every_page_prints_every_way_to_start() -> None:
    ways = [(name, command.split()[0]) for name, command in train_glue_commands()]
    pages = ("docs/text-classification.md", "examples/train_glue.py")
    assert ways == [(page, tool) for page in pages for tool in ("python", "accelerate", "torchrun")]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize(("page", "command"), [c for c in train_glue_commands() if c[1].startswith("python ")])
def test_printed_commands(
    page: str, command: str, as_printed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, script, *arguments = as_printed(command)
    assert script == "examples/train_glue.py"
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
    train_glue.main()
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["train_samples"] == results["eval_samples"] == 64 and "eval_accuracy" in results
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["seed"] == 42


@pytest.mark.smoke
@pytest.mark.parametrize(("tool", "processes"), [("torchrun", 2), ("accelerate", max(1, torch.cuda.device_count()))])
def test_printed_commands_of_several_processes(
    tool: str, processes: int, as_printed: Any, common: list[str], tmp_path: Path
) -> None:
    (command,) = {
        c for name, c in train_glue_commands() if c.startswith(tool) and name == "docs/text-classification.md"
    }
    log = launch(as_printed(command))
    assert f"processes: {processes}," in log  # accelerate launch starts one on a CPU, as it is printed there
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(math.log(2), abs=0.2)
    model = hf_lottalora.AutoLottaLoraModelForSequenceClassification.from_pretrained(tmp_path / "out")
    model.verify_scaffold(full=True)
    assert model.get_plan().seed == 42 and model.peft_config["default"].r == 8


def test_launchers_leave_our_options_alone() -> None:
    options = {
        f"--{name}"
        for arguments in (train_glue.ModelArguments, train_glue.DataArguments, train_glue.LottaLoraArguments)
        for name in arguments.__dataclass_fields__
    }
    assert {"--lora_r", "--lora_alpha", "--lora_dropout"} <= options and "--r" not in options
    for option in sorted(options):
        for parser in (get_args_parser(), launch_command_parser()):
            assert parser.parse_args([SCRIPT, option, "1"]).training_script_args == [option, "1"]


def test_the_short_name_is_still_taken(train: Train) -> None:
    result = train(*rte(), "--r", "2", "--lora_alpha", "2.5", "--lora_dropout", "0.1", "--max_steps", "1")
    config = json.loads((result["folder"] / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 2.5, 0.1)


# ---- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_launch_then_evaluate_the_artifact_in_a_fresh_process(common: list[str], tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, *common, *rte(), "--output_dir", tmp_path / "a"]
    log = launch([*command, "--lora_r", "2", "--scaffold_seed", "5"])
    assert "LottaLoRA plan for BertForSequenceClassification, seed 5" in log
    assert "processes: 1," in log
    assert f"trainable: {EMBEDDINGS + NORMS + CLASSIFIER + ADAPTERS + BETAS:,} of 997,610 parameters (98.21 %)" in log
    results = json.loads((tmp_path / "a" / "all_results.json").read_text())
    assert results["train_samples"] == results["eval_samples"] == 64

    evaluation = f"--do_eval --model_name_or_path {tmp_path / 'a'} --output_dir {tmp_path / 'b'}".split()
    launch([sys.executable, SCRIPT, *common[4:], *rte()[:4], *evaluation])
    again = json.loads((tmp_path / "b" / "eval_results.json").read_text())
    assert {key: again[key] for key in ("eval_loss", "eval_accuracy")} == {
        key: results[key] for key in ("eval_loss", "eval_accuracy")
    }
    model = hf_lottalora.AutoLottaLoraModelForSequenceClassification.from_pretrained(tmp_path / "a")
    model.verify_scaffold(full=True)
    assert model.get_plan().seed == 5
    assert model.config.label2id == {"entailment": 0, "not_entailment": 1}


@pytest.mark.smoke
def test_what_ddp_does_with_a_scaffold() -> None:
    log = launch([BIN / "torchrun", "--standalone", "--nproc_per_node", 2, ROOT / "tests" / "tuner" / "ddp_worker.py"])
    assert "rank 0 of 2: OK" in log
    assert "rank 1 of 2: OK" in log


def test_resume_is_bit_exact_and_the_best_model_is_kept(train: Train) -> None:
    steps = ["--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2"]
    best = ["--load_best_model_at_end", "True", "--metric_for_best_model", "loss"]
    whole = train(*rte(), *steps, *best, "--learning_rate", "3e-2", output="whole")
    assert len(whole["losses"]) == 8

    evaluated = {entry["step"]: entry["eval_loss"] for entry in whole["state"]["log_history"] if "eval_loss" in entry}
    assert whole["state"]["best_metric"] == min(evaluated.values()) < evaluated[8], "the last is the best: no test"
    assert whole["eval_loss"] == whole["state"]["best_metric"]

    checkpoint = str(whole["folder"] / "checkpoint-4")
    options = [*rte(), *steps, *best, "--learning_rate", "3e-2", "--resume_from_checkpoint"]
    resumed = train(*options, checkpoint, output="resumed")
    assert resumed["losses"] == whole["losses"]
    assert resumed["eval_loss"] == whole["eval_loss"]

    train(*options, "last", output="whole")  # at its end already: nothing to train, the folder is not refused
    with pytest.raises(ValueError, match="seed"):
        train(*options, checkpoint, "--scaffold_seed", "1", output="other")


@pytest.mark.parametrize(
    ("options", "trainable"),
    [
        (["lora"], EMBEDDINGS + NORMS + CLASSIFIER + ADAPTERS),
        (["lora", "--embeddings", "frozen", "--norms", "frozen"], CLASSIFIER + ADAPTERS),
        (["full"], 996_578),
    ],
)
def test_methods_to_compare_with(
    train: Train, options: list[str], trainable: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="training")
    result = train(*rte(), "--lora_r", "2", "--method", *options)
    assert result["train_loss"] == pytest.approx(math.log(2), abs=0.1)
    shown = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("trainable"))
    assert f"trainable: {trainable:,} of" in shown


def test_own_files(train: Train, tmp_path: Path) -> None:
    rows = pd.read_parquet(data_dir() / "glue" / "rte" / "train.parquet").head(96)
    named = rows.assign(label=rows.label.map({0: "yes", 1: "no"})).drop(columns="idx")
    named.to_csv(tmp_path / "train.csv", index=False)
    named.tail(32).to_json(tmp_path / "eval.json", orient="records", lines=True)
    files = ["--train_file", f"{tmp_path}/train.csv", "--validation_file", f"{tmp_path}/eval.json"]
    result = train("--do_train", "--do_eval", *files, "--bf16", "True", "--pad_to_max_length", "True", output="classes")
    assert result["eval_samples"] == 32
    assert json.loads((result["folder"] / "config.json").read_text())["label2id"] == {"no": 0, "yes": 1}

    lengths = pd.DataFrame({"text": rows.sentence1, "label": rows.sentence1.str.len() / 100})
    lengths.to_json(tmp_path / "train.jsonl", orient="records", lines=True)
    lengths.tail(32).to_parquet(tmp_path / "eval.parquet", index=False)
    files = ["--train_file", f"{tmp_path}/train.jsonl", "--validation_file", f"{tmp_path}/eval.parquet"]
    result = train("--do_train", "--do_eval", *files, output="regression")
    assert result["eval_mse"] == pytest.approx(result["eval_loss"], rel=1e-4)


def test_mnli_is_evaluated_on_both_of_its_sets(train: Train, tmp_path: Path) -> None:
    rows = pd.read_parquet(data_dir() / "glue" / "rte" / "train.parquet").head(64)
    rows = rows.rename(columns={"sentence1": "premise", "sentence2": "hypothesis"})
    (tmp_path / "mnli").mkdir()
    for split, part in (("train", rows), ("validation_matched", rows[:32]), ("validation_mismatched", rows[32:])):
        part.to_parquet(tmp_path / "mnli" / f"{split}.parquet")
    result = train("--do_train", "--do_eval", "--task_name", "mnli", "--data_dir", str(tmp_path))
    assert {"eval_accuracy", "eval_accuracy_mm"} <= result.keys()
    assert result["eval_samples"] == result["eval_samples_mm"] == 32


# ---- what cannot work is said before anything is done ---------------------------------------------------------------


BAD_ARGUMENTS = [
    ("--task_name mnist", r"--task_name mnist: unknown task, choose one of cola, mnli"),
    ("", r"Pass --task_name, or --train_file"),
    ("--data_dir {tmp}", r"pass --task_name too"),
    ("--task_name rte --data_dir {tmp}", r"rte/train.parquet: no such file"),
    ("--train_file {tmp}/a.csv", r"--validation_file is needed"),
    ("--train_file {tmp}/a.csv --validation_file {tmp}/a.csv", r"a.csv: no such file"),
    ("--train_file {tmp}/a.xlsx --validation_file {tmp}/a.csv", r"a.xlsx: unknown kind of file, expected one of .csv"),
    ("{rte} --max_train_samples 0", r"--max_train_samples must be at least 1, got 0"),
    ("{rte} --model_name_or_path x --config_overrides num_labels=3", r"pass it with --config_name alone"),
    ("{rte} --config_overrides vocab_size=99", r"The tokenizer has 30522 tokens, the model 99"),
    ("{rte} --config_overrides hidden=3", r"--config_overrides hidden=3: key hidden isn't in the original config"),
    ("{rte} --tokenizer_name {tmp}/empty", r"empty has no tokenizer with a vocabulary. Pass --tokenizer_name"),
    ("{rte} --output_dir trainer_output", r"Pass --output_dir"),
    ("{rte} --lora_r 0", r"r must be a positive integer, got 0"),
    ("{rte} --scaffold_seed -1", r"seed"),
    ("{rte} --target_modules nothing", r"target_modules=\['nothing'\] matches no linear layer"),
    ("{rte} --do_predict", r"There is no --do_predict"),
    ("{rte} --resume_from_checkpoint last", r"there is no checkpoint in"),
    ("{rte} --resume_from_checkpoint {tmp}", r"no checkpoint there"),
    ("{rte} --output_dir {tmp}/file", r"file is a file"),
    ("{rte} --output_dir {tmp}/file/below", r"below cannot be written to: Not a directory"),
    ("{rte} --output_dir /proc/new", r"/proc/new cannot be written to"),
    ("{rte} --output_dir {tmp}/full", r"full is not empty. Choose another, or go on with --resume_from_checkpoint"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    BertConfig().save_pretrained(tmp_path / "empty")
    (tmp_path / "full" / "notes.txt").touch()
    words = arguments.format(tmp=tmp_path, rte=" ".join(rte())).split()
    monkeypatch.setattr(
        sys, "argv", [SCRIPT, *common, "--do_train", "--do_eval", "--output_dir", f"{tmp_path}/out", *words]
    )
    with pytest.raises(train_glue.UsageError, match=message):
        train_glue.main()
    assert not list(tmp_path.glob("out/*"))


def test_an_artifact_of_other_labels_is_not_evaluated(train: Train, tmp_path: Path) -> None:
    folder = train(*rte(), "--max_steps", "1")["folder"]
    cola = f"--task_name cola --data_dir {data_dir() / 'glue'} --do_eval --model_name_or_path {folder}".split()
    with pytest.raises(
        train_glue.UsageError, match=r"trained on the labels \['entailment', .*data has \['unacceptable'"
    ):
        train(*cola, output="eval")
    with pytest.raises(train_glue.UsageError, match="it can be evaluated, not trained on"):
        train(*cola, "--do_train", output="eval")


def test_a_model_that_was_never_trained_is_not_evaluated(train: Train) -> None:
    arguments = [argument for argument in rte() if argument != "--do_train"]
    with pytest.raises(train_glue.UsageError, match="would evaluate a model that was never trained"):
        train(*arguments)


def test_errors_are_one_line_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--output_dir", "out"])
    with pytest.raises(SystemExit, match=r"^train_glue.py: error: Pass --do_train, --do_eval or both"):
        runpy.run_path(SCRIPT, run_name="__main__")


def test_every_argument_has_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--help"])
    with pytest.raises(SystemExit):
        train_glue.main()
    shown = capsys.readouterr().out
    for arguments in (train_glue.ModelArguments, train_glue.DataArguments, train_glue.LottaLoraArguments):
        for name, option in arguments.__dataclass_fields__.items():
            assert f"--{name}" in shown
            assert option.metadata["help"]
