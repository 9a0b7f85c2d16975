"""Data of `train_glue.py`: a GLUE task, or your own csv, json or parquet files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from arguments import UsageError
from data_files import READERS, check_file, read_file
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from glue_tasks import PAIR, TASKS, Task, accuracy, mean_squared_error
from transformers import EvalPrediction, PreTrainedTokenizerBase

# Names of column types, or their beginnings.
_TEXT_KINDS = ("string", "large_string")
_CLASS_KINDS = (*_TEXT_KINDS, "int", "uint", "bool")


@dataclass
class DataArguments:
    """Which data to train on: `--task_name` (from the hub, or from `--data_dir`), or your own files."""

    task_name: str | None = field(default=None, metadata={"help": f"A GLUE task: {', '.join(TASKS)}."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Read DIR/<task_name>/train.parquet and validation.parquet there instead of the hub."},
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "A csv, json(l) or parquet file with a column 'label' (integers or strings: classes, floats: "
            "regression) and text columns 'sentence1' and 'sentence2', or one or two others. With --task_name, that "
            "task's columns, labels and metrics."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same to evaluate on."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are truncated to this many tokens."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every input to max_seq_length, rather than each batch to its longest."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many rows only."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenise again even if a cached result exists."})

    def check(self, do_train: bool, do_eval: bool) -> None:
        """Raise `UsageError` for an unknown task, or a file that is missing or of an unknown kind."""
        if self.task_name is not None and self.task_name not in TASKS:
            raise UsageError(f"--task_name {self.task_name}: unknown task, choose one of {', '.join(TASKS)}.")
        if self.data_dir and (self.train_file or self.validation_file):
            raise UsageError("Pass either --data_dir or --train_file and --validation_file, not both.")
        if self.data_dir and not self.task_name:
            raise UsageError("--data_dir holds one folder per GLUE task: pass --task_name too.")
        if not self.task_name and not self.train_file:
            raise UsageError("Pass --task_name, or --train_file (and --validation_file to evaluate).")
        for name in ("max_seq_length", "max_train_samples", "max_eval_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, got {value}.")
        files = self.files()
        needed = (do_train and not self.train_file and "--train_file") or (
            do_eval and not self.validation_file and "--validation_file"
        )
        if files is not None and not self.data_dir and needed:
            raise UsageError(f"{needed} is needed, since you pass files of your own.")
        for file in (files or {}).values():
            check_file(file, READERS)

    def files(self) -> dict[str, str] | None:
        """Local data files by split, or None if the data is on the hub."""
        if self.data_dir:
            splits = ["train", *evaluation_splits(self.task_name)]
            return {split: os.path.join(self.data_dir, str(self.task_name), f"{split}.parquet") for split in splits}
        own = {"train": self.train_file, "validation": self.validation_file}
        return {split: file for split, file in own.items() if file} or None


def evaluation_splits(task_name: str | None) -> list[str]:
    return ["validation_matched", "validation_mismatched"] if task_name == "mnli" else ["validation"]


@dataclass
class TextData:
    """Rows with known text columns and checked labels.

    Attributes:
        sets: by split; the column "label" holds class numbers, or floats for regression.
        columns: one text column, or two.
        labels: the classes' names by number; None for regression.
    """

    sets: DatasetDict
    columns: tuple[str, ...]
    labels: list[str] | None
    task_name: str | None

    @property
    def evaluation(self) -> dict[str, Dataset]:
        """The evaluation sets by the suffix of their metrics' names."""
        return {
            "_mm" if split == "validation_mismatched" else "": rows
            for split, rows in self.sets.items()
            if split != "train"
        }

    def tokenise(self, tokenizer: PreTrainedTokenizerBase, max_length: int, args: DataArguments) -> None:
        """Replace the texts by tokens, in all splits."""

        def encode(rows: Mapping[str, list[Any]]) -> Any:
            texts = [rows[column] for column in self.columns]
            padding = "max_length" if args.pad_to_max_length else False
            return tokenizer(*texts, padding=padding, max_length=max_length, truncation=True)

        for split, rows in self.sets.items():
            others = [name for name in rows.column_names if name != "label"]
            self.sets[split] = rows.map(
                encode,
                batched=True,
                remove_columns=others,
                load_from_cache_file=not args.overwrite_cache,
                desc=f"tokenising {split}",
            )

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """GLUE's metrics; where there are several, `combined_score` is their mean."""
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        predicted = logits.squeeze(-1) if self.labels is None else logits.argmax(axis=-1)
        own = mean_squared_error if self.labels is None else accuracy
        metric = TASKS[self.task_name].metric if self.task_name else own
        result = metric(predicted, prediction.label_ids)
        if len(result) > 1:
            result["combined_score"] = float(np.mean(list(result.values())))
        return result


def load_text_data(args: DataArguments, cache_dir: str | None = None) -> TextData:
    """Read the data and check columns and labels.

    Raises:
        UsageError: a file cannot be read, a column is missing, or labels are not what the task or the training set
            says; the message names the column, what was expected and what was found.
    """
    files = args.files()
    if files is None:
        sets = load_dataset("nyu-mll/glue", args.task_name, cache_dir=cache_dir)
        sets = DatasetDict({split: sets[split] for split in ["train", *evaluation_splits(args.task_name)]})
    else:
        sets = DatasetDict({split: read_file(file, cache_dir=cache_dir) for split, file in files.items()})
    task = TASKS[args.task_name] if args.task_name else None
    columns = task.columns if task else _text_columns(sets["train"])
    for split, rows in sets.items():
        _check_columns(rows, split, columns)
    classes = _task_classes(task) if task else _own_classes(sets["train"])
    for split, rows in sets.items():
        rows = rows.remove_columns([name for name in rows.column_names if name not in (*columns, "label")])
        rows = _with_label_numbers(rows, split, classes)
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        sets[split] = rows.select(range(min(limit or len(rows), len(rows))))
    return TextData(sets, columns, classes and classes.names, args.task_name)


def _kind(rows: Dataset, column: str) -> str:
    return str(getattr(rows.features[column], "dtype", rows.features[column]))


def _check_columns(rows: Dataset, split: str, texts: tuple[str, ...]) -> None:
    for name in (*texts, "label"):
        if name not in rows.column_names:
            raise UsageError(f"{split}: column {name!r} expected, found {', '.join(rows.column_names)}.")
    for name in texts:
        if _kind(rows, name) not in _TEXT_KINDS:
            raise UsageError(f"{split}: column {name!r}: text expected, found {_kind(rows, name)}.")
    for name in (*texts, "label"):
        values = rows[name][:]
        if None in values:
            raise UsageError(
                f"{split}: column {name!r}: a value in each row expected, found none in row {values.index(None)}."
            )


def _text_columns(rows: Dataset) -> tuple[str, ...]:
    if set(PAIR) <= set(rows.column_names):
        return PAIR
    texts = [name for name in rows.column_names if name != "label" and _kind(rows, name) in _TEXT_KINDS]
    if not 1 <= len(texts) <= 2:
        raise UsageError(
            f"Text columns 'sentence1' and 'sentence2', or one or two of any name, expected; found {texts or 'none'}."
        )
    return tuple(texts)


class _Classes(NamedTuple):
    names: list[str]
    numbers: dict[str, int]  # of each label as it is written


def _task_classes(task: Task) -> _Classes | None:
    return _by_number_or_name(task.labels) if task.labels else None


def _by_number_or_name(names: Sequence[str]) -> _Classes:
    return _Classes(list(names), {key: i for i, name in enumerate(names) for key in (str(i), name)})


def _own_classes(train: Dataset) -> _Classes | None:
    """The labels that the training set has, sorted; None if they are floats, which means regression."""
    if isinstance(train.features["label"], ClassLabel):
        return _by_number_or_name(train.features["label"].names)
    if _kind(train, "label").startswith("float"):
        return None
    if not _kind(train, "label").startswith(_CLASS_KINDS):
        raise UsageError(f"train: column 'label': integers, strings or floats expected, found {_kind(train, 'label')}.")
    names = [str(value) for value in sorted(set(train["label"]))]
    if len(names) < 2:
        raise UsageError(f"train: column 'label': two or more classes expected, found {names}.")
    return _Classes(names, {name: number for number, name in enumerate(names)})


def _with_label_numbers(rows: Dataset, split: str, classes: _Classes | None) -> Dataset:
    """`rows` with class numbers or floats as labels, whatever they were written as."""
    where = f"{split}: column 'label'"
    kind = _kind(rows, "label")
    values = rows["label"][:]
    if classes is None:
        if not kind.startswith(("float", "int")):
            raise UsageError(f"{where}: numbers expected, found {kind}, such as {values[0]!r}.")
        bad = [value for value in values if not math.isfinite(value)]
        if bad:
            raise UsageError(f"{where}: finite numbers expected, found {bad[0]!r}.")
        labels, feature = [float(value) for value in values], Value("float32")
    else:
        expected = f"one of {list(classes.numbers)} expected"
        if not kind.startswith(_CLASS_KINDS):
            raise UsageError(f"{where}: {expected}, found {kind}, such as {values[0]!r}.")
        bad = [value for value in values if str(value) not in classes.numbers]
        if bad:
            raise UsageError(f"{where}: {expected}, found {bad[0]!r} in row {values.index(bad[0])}.")
        labels, feature = [classes.numbers[str(value)] for value in values], Value("int64")
    return rows.remove_columns("label").add_column("label", labels, feature=feature)
