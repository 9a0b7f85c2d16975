"""`examples/glue_data.py`: metrics against values worked out by hand, and what it says of data that does not fit."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from glue_data import DataArguments, TextData, UsageError, load_text_data
from transformers import EvalPrediction


def two_classes(task: str) -> dict[str, float]:
    """Scores of the predictions 1 0 1 1 for the labels 1 0 0 1."""
    data = TextData(None, (), ["a", "b"], task)
    logits = np.array([[0.0, 1], [1, 0], [0, 1], [-1, 1]])
    return data.compute_metrics(EvalPrediction(predictions=logits, label_ids=np.array([1, 0, 0, 1])))


@pytest.mark.parametrize("task", ["sst2", "rte", "qnli", "wnli", "mnli", None])
def test_accuracy(task: str) -> None:
    assert two_classes(task) == {"accuracy": 0.75}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_f1_and_accuracy(task: str) -> None:
    # two true positives, one false one: f1 = 2 * 2 / (2 * 2 + 1)
    assert two_classes(task) == pytest.approx({"accuracy": 0.75, "f1": 0.8, "combined_score": 0.775})


def test_matthews_correlation() -> None:
    # (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = (2 * 1 - 0) / sqrt(3 * 2 * 2 * 1)
    assert two_classes("cola") == pytest.approx({"matthews_correlation": 2 / math.sqrt(12)})


def test_regression_metrics() -> None:
    predicted, labels = np.array([[1.0], [2], [4]]), np.array([1.0, 3, 2])
    # centred: (-4/3, -1/3, 5/3) and (-1, 1, 0); ranks 1 2 3 and 1 3 2
    pearson = (4 / 3 - 1 / 3) / math.sqrt((16 + 1 + 25) / 9 * 2)
    wanted = {"pearson": pearson, "spearmanr": 0.5, "combined_score": (pearson + 0.5) / 2}
    prediction = EvalPrediction(predictions=predicted, label_ids=labels)
    assert TextData(None, (), None, "stsb").compute_metrics(prediction) == pytest.approx(wanted)
    assert TextData(None, (), None, None).compute_metrics(prediction) == pytest.approx({"mse": 5 / 3})


BAD_DATA = [
    (
        "csv",
        "sentence,label\na,0\nb,2\n",
        "sst2",
        r"train: column 'label': one of .*'1', 'positive'\] expected, found 2 in",
    ),
    ("csv", "sentence,label\na,0\nb,x\n", "sst2", r"one of .* expected, found 'x' in row 1"),
    ("csv", "sentence,label\na,0.5\nb,1\n", "sst2", r"one of .* expected, found float64, such as 0.5"),
    ("csv", "sentence,label\na,0\nb,\n", "sst2", r"'label': a value in each row expected, found none in row 1"),
    ("csv", "sentence,label\na,0\n", None, r"two or more classes expected, found \['0'\]"),
    ("csv", "sentence,label\n", None, r"has no rows: "),
    ("csv", "sentence,target\na,0\n", None, r"train: column 'label' expected, found sentence, target"),
    ("csv", "text,label\na,0\nb,1\n", "sst2", r"train: column 'sentence' expected, found text, label"),
    ("csv", "a,b,c,label\nx,y,z,0\nx,y,z,1\n", None, r"one or two of any name, expected; found \['a', 'b', 'c'\]"),
    ("json", '{"text": "a", "label": 0}\n{"text": "b", "label": "x"}\n', None, r"integers, strings or floats expected"),
    ("json", '{"text": "a", "label": [0]}\n', None, r"integers, strings or floats expected"),
    ("json", '{"text": "a", "label":', None, r"train.json: cannot be read"),
    ("csv", "sentence1,sentence2,label\na,b,good\n", "stsb", r"numbers expected, found .*string, such as 'good'"),
    ("parquet", "not parquet", None, r"train.parquet: cannot be read"),
]


@pytest.mark.parametrize(("kind", "text", "task", "message"), BAD_DATA)
def test_bad_data(tmp_path: Path, kind: str, text: str, task: str | None, message: str) -> None:
    file = tmp_path / f"train.{kind}"
    file.write_text(text)
    arguments = DataArguments(task_name=task, train_file=str(file))
    arguments.check(do_train=True, do_eval=False)
    with pytest.raises(UsageError, match=message):
        load_text_data(arguments, str(tmp_path))


def test_labels_that_only_the_validation_set_has(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "eval.csv").write_text("text,label\na,x\nb,z\n")
    files = {"train_file": str(tmp_path / "train.csv"), "validation_file": str(tmp_path / "eval.csv")}
    with pytest.raises(UsageError, match=r"validation: column 'label': one of \['x', 'y'\] expected, found 'z'"):
        load_text_data(DataArguments(**files), str(tmp_path))
