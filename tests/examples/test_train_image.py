"""`examples/train_image.py` on made pictures with a tiny Vision Transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import train_image
from arguments import UsageError
from PIL import Image
from scripts import run_script

from hf_lottalora import AutoLottaLoraModelForImageClassification

Train = Callable[..., dict[str, Any]]
SIZES = "image_size=8,patch_size=4,hidden_size=16,intermediate_size=32,num_hidden_layers=2,num_attention_heads=2"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 32 red and one of 32 blue pictures, and the same as a table of bytes."""
    folder = tmp_path_factory.mktemp("pictures")
    random, rows = np.random.default_rng(0), []
    for label, channel in (("red", 0), ("blue", 2)):
        (folder / "train" / label).mkdir(parents=True)
        for number in range(32):
            pixels = random.integers(0, 100, (10, 12, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            file = folder / "train" / label / f"{number}.png"
            Image.fromarray(pixels).save(file)
            rows.append({"img": file.read_bytes(), "colour": label})
    pd.DataFrame(rows).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture
def train(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    def run(*arguments: str, output: str = "out") -> dict[str, Any]:
        common = f"--model_type vit --config_overrides {SIZES} --cache_dir {pictures}/cache --max_steps 20 --do_train"
        common += " --do_eval --learning_rate 1e-2 --logging_steps 1 --validation_split_percentage 25"
        return run_script(train_image, [*common.split(), *arguments], tmp_path / output, monkeypatch)

    return run


def folder(pictures: Path) -> list[str]:
    return ["--train_dir", f"{pictures}/train"]


def table(pictures: Path) -> list[str]:
    return f"--train_file {pictures}/train.parquet --image_column_name img --label_column_name colour".split()


@pytest.mark.parametrize("source", [folder, table])
def test_a_run_and_what_it_saves(
    train: Train, pictures: Path, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(*source(pictures))
    assert (run["train_samples"], run["eval_samples"], run["eval_accuracy"]) == (48, 16, 1.0)
    assert run["losses"][-1] < 0.5 * run["losses"][0]
    again = AutoLottaLoraModelForImageClassification.from_pretrained(run["folder"])
    again.verify_scaffold(full=True)
    assert again.config.id2label == {0: "blue", 1: "red"} and (run["folder"] / "preprocessor_config.json").is_file()
    inputs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(inputs).logits, run["trainer"].model.eval()(inputs).logits)

    evaluation = f"--model_name_or_path {run['folder']} --do_eval --cache_dir {pictures}/cache".split()
    validation = [word.replace("--train_", "--validation_") for word in source(pictures)]
    alone = run_script(train_image, [*evaluation, *validation], tmp_path / "eval", monkeypatch)
    assert (alone["eval_samples"], alone["eval_accuracy"]) == (64, 1.0)


def test_resume_is_bit_exact(train: Train, pictures: Path) -> None:
    # Within the first epoch: in a later one the oldest supported versions shuffle anew.
    whole = train(*folder(pictures), "--save_steps", "4")
    resume = ["--resume_from_checkpoint", str(whole["folder"] / "checkpoint-4")]
    assert train(*folder(pictures), *resume, output="resumed")["losses"] == whole["losses"]


def test_few_of_pictures_in_the_order_of_their_classes(train: Train, pictures: Path) -> None:
    run = train(*folder(pictures), "--max_train_samples", "10", "--max_steps", "1")
    assert run["train_samples"] == 10 and set(run["trainer"].train_dataset.with_format(None)["labels"]) == {0, 1}


BAD_ARGUMENTS = [
    ("", r"Pass --dataset_name, or --train_file"),
    ("--train_dir {pictures}/none", r"none: no such folder"),
    ("--train_dir {pictures}/train --train_file x.csv", r"either a folder or a file, not both|x.csv: no such file"),
    ("--train_dir {pictures}/train/red", r"train: column 'label' expected, found image. Pass --label_column_name"),
    ("--train_file {pictures}/train.parquet", r"train: column 'image' expected, found img, colour. Pass --image_col"),
    ("--train_file {tmp}/a.csv", r"column 'image': pictures expected, found int64"),
    ("--train_file {tmp}/b.csv", r"train: column 'label': a value in each row expected, found none"),
    (
        "--train_file {tmp}/c.parquet --image_column_name img",
        r"column 'label': two or more classes expected, found \['0'\]",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(train: Train, pictures: Path, tmp_path: Path, arguments: str, message: str) -> None:
    (tmp_path / "a.csv").write_text("image,label\n1,0\n2,1\n")
    (tmp_path / "b.csv").write_text("image,label\nx,0\ny,\n")
    pd.read_parquet(pictures / "train.parquet").assign(label=0).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(UsageError, match=message):
        train(*arguments.format(pictures=pictures, tmp=tmp_path).split())
    assert not list(tmp_path.glob("out/*"))


def test_labels_that_only_the_validation_set_has(train: Train, tmp_path: Path, pictures: Path) -> None:
    rows = pd.read_parquet(pictures / "train.parquet")
    rows.assign(colour=rows.colour.replace("red", "green")).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(
        UsageError, match=r"validation: column 'colour': one of \['blue', 'red'\] expected, found \['green'\]"
    ):
        train(*table(pictures), "--validation_file", f"{tmp_path}/other.parquet")
