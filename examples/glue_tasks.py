"""The GLUE tasks: columns, labels and metrics. The metrics are those of `evaluate.load("glue", task)`, offline."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"accuracy": float((predictions == labels).mean())}


def accuracy_and_f1(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {**accuracy(predictions, labels), "f1": float(f1_score(y_true=labels, y_pred=predictions))}


def matthews(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"matthews_correlation": float(matthews_corrcoef(labels, predictions))}


def correlations(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "pearson": float(pearsonr(predictions, labels)[0]),
        "spearmanr": float(spearmanr(predictions, labels)[0]),
    }


def mean_squared_error(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"mse": float(((predictions - labels) ** 2).mean())}


class Task(NamedTuple):
    """The text columns of a GLUE task, its label names (None: a real number) and its metrics."""

    columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    metric: Callable[[np.ndarray, np.ndarray], dict[str, float]] = accuracy


ENTAILMENT = ("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), matthews),
    "mnli": Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "mrpc": Task(PAIR, ("not_equivalent", "equivalent"), accuracy_and_f1),
    "qnli": Task(("question", "sentence"), ENTAILMENT),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), accuracy_and_f1),
    "rte": Task(PAIR, ENTAILMENT),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "stsb": Task(PAIR, None, correlations),
    "wnli": Task(PAIR, ("not_entailment", "entailment")),
}
