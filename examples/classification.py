"""Classes, and models with a head for them: what `train_glue.py`, `train_image.py` and `train_speech.py` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arguments import LottaLoraArguments, ModelArguments, UsageError, is_artifact
from datasets import ClassLabel, Dataset, Value
from torch import nn
from training import load_artifact, load_config, load_model
from transformers import EvalPrediction, PreTrainedConfig


def classifier_config(args: ModelArguments, labels: Sequence[str] | None) -> PreTrainedConfig:
    """The architecture with these labels, of a trained model with its own where there are none."""
    if labels is None:
        return load_config(args)
    config = load_config(args, num_labels=len(labels))
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    return config


def load_classifier(
    kind: type, config: PreTrainedConfig, args: ModelArguments, lottalora: LottaLoraArguments
) -> nn.Module:
    """The base model with a head for the labels of `config`, or a whole artifact. `kind` is an AutoModel."""
    if is_artifact(args.model_name_or_path):
        model = load_artifact(kind, args, lottalora)
        known, labels = (list(one.id2label.values()) for one in (model.config, config))
        if known != labels:
            raise UsageError(f"{args.model_name_or_path} was trained on the labels {known}, the data has {labels}.")
    else:
        model = load_model(kind, config, args, lottalora)
    # Classifiers return a batch's mean loss. Trainer takes them to divide by the whole step's rows, and would scale
    # their gradients by the number of processes and of accumulated batches.
    model.accepts_loss_kwargs = False
    return model


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(axis=-1) == prediction.label_ids).mean())}


def check_column(split: str, rows: Dataset, column: str, option: str) -> None:
    """Raise `UsageError` unless the column is there, with a value in each row."""
    if column not in rows.column_names:
        found = ", ".join(rows.column_names)
        raise UsageError(f"{split}: column {column!r} expected, found {found}. Pass --{option}.")
    if rows.data.column(column).null_count:
        raise UsageError(f"{split}: column {column!r}: a value in each row expected, found none in some.")


def class_names(rows: Dataset, column: str) -> list[str]:
    """Names of the classes: as the data names them, else the values that are there, sorted."""
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if not str(getattr(feature, "dtype", feature)).startswith(("string", "large_string", "int", "uint", "bool")):
        raise UsageError(f"column {column!r}: names or numbers of classes expected, found {feature}.")
    names = [str(value) for value in sorted(rows.unique(column))]
    if len(names) < 2:
        raise UsageError(f"column {column!r}: two or more classes expected, found {names}.")
    return names


def with_class_numbers(sets: dict[str, Dataset], column: str, names: Sequence[str]) -> dict[str, Dataset]:
    """`sets` with a column "labels" of numbers in place of `column`, as Trainer wants them."""
    found = {}
    for split, rows in sets.items():
        numbers = _class_numbers(split, rows, column, names)
        found[split] = rows.remove_columns(column).add_column("labels", numbers, feature=Value("int64"))
    return found


def _class_numbers(split: str, rows: Dataset, column: str, names: Sequence[str]) -> list[int]:
    """Of each row the number of its class in `names`."""
    feature = rows.features[column]
    written: list[Any] = rows[column][:]
    if isinstance(feature, ClassLabel):
        written = feature.int2str(written)
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted({str(value) for value in written} - numbers.keys())
    if unknown:
        raise UsageError(f"{split}: column {column!r}: one of {list(names)} expected, found {unknown}.")
    return [numbers[str(value)] for value in written]
