"""`examples/train_clm.py` on a made text with a tiny Llama; several processes where the point is processes."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import sizes
import torch
import train_clm
from accelerate import init_empty_weights
from accelerate.utils import compare_versions
from arguments import UsageError
from paper import TOTALS
from peft import get_peft_model
from safetensors.torch import load_file
from scripts import ROOT, TORCHRUN, launch, run_script
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hf_lottalora import AutoLottaLoraModelForCausalLM, LottaLoraConfig, make_plan

CONFIGS = ROOT / "examples" / "configs"
SIZE = 275
Train = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text to train and evaluate on, an architecture, and a cache."""
    folder = tmp_path_factory.mktemp("inputs")
    choose = random.Random(0)
    words = [choose.choice(["the cat", "a dog", "sat on", "ran to", "the mat", "é"]) for _ in range(6_000)]
    lines = [" ".join(words[i : i + 6]) + "\n" for i in range(0, len(words), 6)]
    (folder / "train.txt").write_text("".join(lines[:900]))
    (folder / "valid.txt").write_text("".join(lines[900:]))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(vocab_size=SIZE, max_position_embeddings=64, **sizes).save_pretrained(folder / "llama")
    return folder


@pytest.fixture
def common(inputs: Path) -> list[str]:
    """Arguments of every run: the tiny network, a tokenizer of its own, 16 steps of 8 blocks of 16 tokens."""
    arguments = f"--config_name {inputs}/llama --train_tokenizer {SIZE} --cache_dir {inputs}/cache --block_size 16"
    arguments += " --max_steps 16 --learning_rate 1e-2 --logging_steps 1 --max_eval_samples 20 --do_train --do_eval"
    return [*arguments.split(), *files(inputs)]


def files(inputs: Path) -> list[str]:
    return f"--train_file {inputs}/train.txt --validation_file {inputs}/valid.txt".split()


@pytest.fixture
def train(common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    def run(*arguments: str, output: str = "out") -> dict[str, Any]:
        return run_script(train_clm, [*common, *arguments], tmp_path / output, monkeypatch)

    return run


def test_a_run_and_what_it_saves(train: Train, common: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = train("--lora_r", "2", "--scaffold_seed", "5")
    # The oldest supported Trainer divides by all 16 labels of a block, of which 15 are predicted.
    share = run["losses"][0] / math.log(SIZE)
    assert share == pytest.approx(1, rel=0.02) or share == pytest.approx(15 / 16, rel=0.02)
    assert run["losses"][-1] < 0.7 * run["losses"][0]
    assert run["eval_perplexity"] == pytest.approx(math.exp(run["eval_loss"])) and run["eval_samples"] == 20
    assert run["eval_perplexity"] == run["trainer"].state.log_history[-1]["eval_perplexity"]

    tokenizer = AutoTokenizer.from_pretrained(run["folder"])
    text = "the cat sat on é 🐈\n\tanew"
    assert len(tokenizer) == SIZE and tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = torch.tensor([tokenizer("the cat sat on the mat")["input_ids"]])
    again = AutoLottaLoraModelForCausalLM.from_pretrained(run["folder"])
    again.verify_scaffold(full=True)
    assert again.get_plan().seed == 5 and again.config.eos_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, run["trainer"].model.eval()(input_ids=ids).logits)
    assert not [key for key in load_file(run["folder"] / "adapter_model.safetensors") if "mlp" in key]

    evaluation = [word for word in common[4:] if word != "--do_train"]
    evaluation += ["--model_name_or_path", str(run["folder"]), "--residency", "packed"]
    alone = run_script(train_clm, evaluation, run["folder"].with_name("eval"), monkeypatch)
    assert alone["eval_loss"] == run["eval_loss"]


def test_resume_is_bit_exact_and_the_tokenizer_is_made_once(
    train: Train, inputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="clm_data")
    steps = ["--save_steps", "8", "--train_tokenizer", "270"]
    whole = train(*steps)
    resumed = train(*steps, "--resume_from_checkpoint", str(whole["folder"] / "checkpoint-8"), output="resumed")
    assert resumed["losses"] == whole["losses"] and resumed["eval_loss"] == whole["eval_loss"]
    train(*steps, "--resume_from_checkpoint", "last")  # at its end already: the folder is not refused
    assert [record.getMessage() for record in caplog.records] == ["Training a tokenizer of 270 tokens."]
    train(*steps, "--max_steps", "1", "--train_file", f"{inputs}/valid.txt", output="other text")
    assert len(caplog.records) == 2


def test_residencies_and_models_that_were_never_dense_give_the_same(train: Train, inputs: Path) -> None:
    runs = {name: train("--family", "binary", "--residency", name, output=name) for name in ("packed", "streamed")}
    runs["dense"] = train("--family", "binary")
    assert runs["packed"]["losses"] == runs["streamed"]["losses"] == runs["dense"]["losses"]
    # The script builds on the meta device; this is the way over a model with weights.
    base = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(inputs / "llama", bos_token_id=0, eos_token_id=0)
    )
    model = get_peft_model(base, LottaLoraConfig(seed=42, r=8, lora_alpha=8, family="binary", task_type="CAUSAL_LM"))
    state = runs["dense"]["trainer"].model.state_dict()
    frozen = {name for name, value in model.named_parameters() if ".base_layer." in name or ".mlp." in name}
    assert len(frozen) == 14 and all(torch.equal(model.state_dict()[name], state[name]) for name in frozen)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_methods_to_compare_with(train: Train, method: str) -> None:
    run = train("--method", method)
    assert run["losses"][-1] < run["losses"][0]


def test_kinds_of_files(train: Train, inputs: Path, tmp_path: Path) -> None:
    lines = (inputs / "train.txt").read_text().splitlines(keepends=True)
    with gzip.open(tmp_path / "rows.txt.gz", "wt") as file:
        file.writelines(lines)
    rows = pd.DataFrame({"number": range(len(lines)), "text": lines})
    rows.to_csv(tmp_path / "rows.csv", index=False)
    rows.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    rows.to_parquet(tmp_path / "rows.parquet")
    same = train("--max_steps", "2")["losses"]
    for kind in ("txt.gz", "csv", "jsonl", "parquet"):
        assert train("--max_steps", "2", "--train_file", f"{tmp_path}/rows.{kind}", output=kind)["losses"] == same


def test_a_part_of_the_text_to_evaluate_on(train: Train, common: list[str], tmp_path: Path) -> None:
    del common[-2:]
    run = train("--validation_split_percentage", "10", "--max_steps", "1", "--max_eval_samples", "1000")
    first = (Path(common[-1])).read_text().splitlines(keepends=True)[:90]
    tokens = run["trainer"].processing_class("".join(first))["input_ids"]
    assert run["eval_samples"] == pytest.approx(len(tokens) / 16, abs=3)


def test_a_folder_as_a_data_set(train: Train, common: list[str], inputs: Path, tmp_path: Path) -> None:
    same = train("--max_steps", "2")
    for name in ("train", "valid"):
        (tmp_path / "set" / f"{name}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "set" / f"{name}.txt").write_text((inputs / f"{name}.txt").read_text())
    del common[-4:]
    run = train("--dataset_name", f"{tmp_path}/set", "--max_steps", "2", output="folder")
    assert run["losses"][0] == pytest.approx(same["losses"][0], rel=0.02) and run["eval_samples"] == 20
    with pytest.raises(UsageError, match=r"--dataset_name .*nothing: cannot be read, or has no rows"):
        train("--dataset_name", f"{tmp_path}/nothing", output="nothing")


def test_streaming(train: Train, common: list[str], inputs: Path) -> None:
    tokenizer = train("--max_steps", "1")["folder"]
    common[2:4] = ["--tokenizer_name", str(tokenizer)]
    run = train("--streaming", "--max_train_samples", "64", output="stream")  # half an epoch, then it starts anew
    assert run["losses"][-1] < 0.7 * run["losses"][0] and "train_samples" not in run
    del common[-2:]
    with pytest.raises(UsageError, match="Of 1 rows 5 % are all of them. Pass --validation_file to evaluate"):
        (inputs / "one.txt").write_text("a line\n")
        train("--train_file", f"{inputs}/one.txt", output="one")
    with pytest.raises(UsageError, match="A stream has no part to evaluate on. Pass --validation_file"):
        train("--streaming", output="no part")


BAD_ARGUMENTS = [
    ("--do_predict", r"There is no --do_predict"),
    ("--model_type llama", r"either --config_name or --model_type, not both"),
    ("--model_name_or_path x --tokenizer_name y", r"--train_tokenizer makes a new one"),
    ("--config_name {tmp}/nothing", r"nothing has no config.json that can be loaded"),
    ("--config_overrides hidden=3", r"--config_overrides hidden=3: key hidden isn't in the original config"),
    ("--train_tokenizer 276", r"--train_tokenizer 276: the model has 275 tokens. Pass fewer, or --config_overrides"),
    ("--train_tokenizer 256", r"--train_tokenizer must be at least 257, every byte and the end of a text, got 256"),
    ("--streaming", r"--train_tokenizer reads all of the text, which --streaming is not to do"),
    ("--train_file {tmp}/a.docx", r"a.docx: unknown kind of file, expected one of .csv, .json, .jsonl, .parquet, .txt"),
    ("--train_file {tmp}/a.txt", r"a.txt: no such file"),
    ("--train_file {tmp}/short.txt --validation_file {tmp}/none.txt", r"none.txt: no such file"),
    ("--train_file {tmp}/empty.txt", r"empty.txt: cannot be read, or has no rows|train: there is no row"),
    ("--train_file {tmp}/short.txt", r"train: the text is shorter than a block of 16 tokens"),
    ("--train_file {tmp}/numbers.csv", r"train: column 'x': text expected, found int"),
    ("--train_file {tmp}/holes.csv", r"train: column 'text': a text in each row expected, found none in row 1"),
    ("--dataset_name wikitext", r"either --dataset_name or files of your own, not both"),
    ("--block_size 1", r"--block_size must be at least 2, got 1"),
    ("--max_train_samples 0", r"--max_train_samples must be at least 1, got 0"),
    ("--validation_split_percentage 100", r"must be between 1 and 99, got 100"),
    ("--lora_r 0", r"r must be a positive integer, got 0"),
    ("--target_modules nothing", r"target_modules=\['nothing'\] matches no linear layer"),
    ("--output_dir {tmp}/full", r"full is not empty. Choose another, or go on with --resume_from_checkpoint"),
    ("--resume_from_checkpoint last", r"there is no checkpoint in"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("a cat\n")
    (tmp_path / "numbers.csv").write_text("x\n1\n2\n")
    (tmp_path / "holes.csv").write_text("text,other\na cat,1\n,2\n")
    words = ["train_clm.py", *common, "--output_dir", f"{tmp_path}/out", *arguments.format(tmp=tmp_path).split()]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(UsageError, match=message):
        train_clm.main()
    assert not list(tmp_path.glob("out/*")) and len(list(tmp_path.glob("full/*"))) == 1


def test_a_tokenizer_is_needed(common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del common[2:4]
    with pytest.raises(UsageError, match=r"Or --train_tokenizer 32000, which makes one of the text"):
        run_script(train_clm, common, tmp_path / "out", monkeypatch)
    with pytest.raises(UsageError, match=r"--model_type has no tokenizer"):
        run_script(train_clm, ["--model_type", "gpt2", *common[2:]], tmp_path / "out", monkeypatch)


@pytest.mark.parametrize("scale", TOTALS)
def test_configs_are_the_papers(scale: str) -> None:
    config = AutoConfig.from_pretrained(CONFIGS / f"llama-{scale.lower()}")
    files_own = {"architectures": None, "_name_or_path": ""}
    assert {**config.to_dict(), **files_own} == {**sizes.architecture(scale).to_dict(), **files_own}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    plan = make_plan(model, LottaLoraConfig(seed=42, r=8, lora_alpha=16))
    assert plan.adapter_parameters == sizes.SCALES[scale][-1][-1]
    assert plan.total_parameters - plan.adapter_parameters == TOTALS[scale] == model.num_parameters()


@pytest.mark.smoke
@pytest.mark.skipif(compare_versions("accelerate", "<", "1.15"), reason="FSDP2 is refused with it")
def test_two_processes(common: list[str], train: Train, tmp_path: Path) -> None:
    alone = train("--per_device_train_batch_size", "8")
    common += ["--per_device_train_batch_size", "4", "--use_cpu", "--ddp_backend", "gloo"]
    launch([*TORCHRUN, ROOT / "examples" / "train_clm.py", *common, "--output_dir", tmp_path / "ddp"])
    fsdp = ["--fsdp", "full_shard", "--fsdp_config", '{"version": 2, "cpu_ram_efficient_loading": false}']
    worker = [*TORCHRUN, Path(__file__).with_name("fsdp2_train_clm.py")]
    launch([*worker, *common, *fsdp, "--output_dir", tmp_path / "fsdp2"])
    for name in ("ddp", "fsdp2"):
        results = json.loads((tmp_path / name / "all_results.json").read_text())
        assert results["eval_loss"] == pytest.approx(alone["eval_loss"], rel=0.02)
        AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path / name).verify_scaffold(full=True)
