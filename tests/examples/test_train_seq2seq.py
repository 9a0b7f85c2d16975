"""`examples/train_seq2seq.py` on made pairs with a tiny T5 and a tiny BART."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import train_seq2seq
from arguments import UsageError
from scripts import run_script
from transformers import BartConfig, BertTokenizer, PreTrainedTokenizerFast, T5Config

from hf_lottalora import AutoLottaLoraModelForSeq2SeqLM

Train = Callable[..., dict[str, Any]]
WORDS = {"one": "un", "two": "deux", "three": "trois", "four": "quatre"}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of texts, word by word, their vocabulary, and two architectures."""
    folder, choose = tmp_path_factory.mktemp("inputs"), random.Random(0)
    sources = [choose.choices(list(WORDS), k=2) for _ in range(120)]
    rows = pd.DataFrame(
        {
            "source": [" ".join(words) for words in sources],
            "target": [" ".join(WORDS[word] for word in words) for words in sources],
        }
    )
    rows.to_csv(folder / "train.csv", index=False)
    rows.rename(columns={"source": "en", "target": "fr"}).to_json(folder / "t.jsonl", orient="records", lines=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *WORDS.values()]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "tokenizer")
    t5 = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 1}
    T5Config(vocab_size=len(tokens), **t5, dropout_rate=0).save_pretrained(folder / "t5")
    bart = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
            {"layers": 1, "attention_heads": 2, "ffn_dim": 64}.items()}  # fmt: skip
    BartConfig(vocab_size=len(tokens), d_model=32, **bart, dropout=0.0).save_pretrained(folder / "bart")
    return folder


@pytest.fixture
def train(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    def run(*arguments: str, output: str = "out", model: str = "t5") -> dict[str, Any]:
        common = f"--config_name {inputs}/{model} --tokenizer_name {inputs}/tokenizer --cache_dir {inputs}/cache"
        common += f" --train_file {inputs}/train.csv --max_steps 30 --do_train --do_eval --learning_rate 1e-2"
        common += " --logging_steps 1 --max_target_length 8 --per_device_train_batch_size 16"
        return run_script(train_seq2seq, [*common.split(), *arguments], tmp_path / output, monkeypatch)

    return run


@pytest.mark.parametrize("model", ["t5", "bart"])
def test_a_run_and_what_it_saves(train: Train, model: str) -> None:
    run = train("--predict_with_generate", "--save_steps", "5", model=model)
    assert run["losses"][-1] < 0.6 * run["losses"][0] and run["eval_samples"] == 6 and 0 <= run["eval_exact_match"] <= 1
    again = AutoLottaLoraModelForSeq2SeqLM.from_pretrained(run["folder"])
    again.verify_scaffold(full=True)
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        mine, theirs = (m.eval()(input_ids=ids, labels=ids) for m in (again, run["trainer"].model))
    assert torch.equal(mine.logits, theirs.logits)
    assert (again.config.pad_token_id, again.config.eos_token_id) == (0, 3)

    # Within the first epoch: in a later one the oldest supported versions shuffle anew.
    resumed = train("--resume_from_checkpoint", str(run["folder"] / "checkpoint-5"), model=model, output="resumed")
    assert resumed["losses"] == run["losses"] and "eval_exact_match" not in resumed


def test_other_columns(train: Train, inputs: Path) -> None:
    options = f"--train_file {inputs}/t.jsonl --source_column en --target_column fr --max_steps 1".split()
    assert train(*options, "--max_train_samples", "10")["train_samples"] == 10


def test_exact_match_counts_whole_texts(inputs: Path) -> None:
    tokenizer = BertTokenizer(str(inputs / "vocab.txt"))
    prediction = type("P", (), {})()
    prediction.predictions = torch.tensor([[2, 9, 10, 3, -100], [2, 9, 9, 3, 0]]).numpy()
    prediction.label_ids = torch.tensor([[2, 9, 10, 3], [2, 9, 10, 3]]).numpy()
    assert train_seq2seq.exact_match(tokenizer)(prediction) == {"exact_match": 0.5}


BAD_ARGUMENTS = [
    ("--source_column x", r"train: column 'x' expected, found source, target. Pass --source_column"),
    ("--train_file {tmp}/numbers.csv", r"train: column 'target': text expected, found int64"),
    ("--train_file {tmp}/holes.csv", r"train: column 'target': a value in each row expected, found none"),
    ("--max_target_length 0", r"--max_target_length must be at least 1, got 0"),
    ("--config_overrides vocab_size=5", r"The tokenizer has 13 tokens, the model 5"),
    ("--tokenizer_name {tmp}/no_pad", r"The tokenizer has no token to pad with"),
    ("--target_modules nothing", r"target_modules=\['nothing'\] matches no linear layer"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(train: Train, inputs: Path, tmp_path: Path, arguments: str, message: str) -> None:
    (tmp_path / "numbers.csv").write_text("source,target\na,1\nb,2\n")
    (tmp_path / "holes.csv").write_text("source,target\na,x\nb,\n")
    own = BertTokenizer(str(inputs / "vocab.txt")).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=own).save_pretrained(tmp_path / "no_pad")
    with pytest.raises(UsageError, match=message):
        train(*arguments.format(tmp=tmp_path).split())
    assert not list(tmp_path.glob("out/*"))
