"""Which classes of ours load an artifact, and which auto classes of transformers each stands for."""

from __future__ import annotations

from typing import Any

import transformers

# Loaders of ours that the card may show, with what each builds.
LOADERS = {
    "AutoLottaLoraModelForCausalLM": transformers.AutoModelForCausalLM,
    "AutoLottaLoraModelForSequenceClassification": transformers.AutoModelForSequenceClassification,
    "AutoLottaLoraModelForTokenClassification": transformers.AutoModelForTokenClassification,
    "AutoLottaLoraModelForQuestionAnswering": transformers.AutoModelForQuestionAnswering,
    "AutoLottaLoraModelForSeq2SeqLM": transformers.AutoModelForSeq2SeqLM,
    "AutoLottaLoraModelForImageClassification": transformers.AutoModelForImageClassification,
    "AutoLottaLoraModel": transformers.AutoModel,
}


def builds(auto: Any, architecture: Any, class_name: str) -> bool:
    """Whether this auto class of transformers makes a `class_name` of the architecture."""
    if type(architecture) not in auto._model_mapping:
        return False
    built = auto._model_mapping[type(architecture)]
    return any(c.__name__ == class_name for c in (built if isinstance(built, tuple) else (built,)))


def loader_of(architecture: Any, class_name: str) -> str | None:
    """Name of the class of ours that builds a `class_name`, None where there is none."""
    return next((ours for ours, auto in LOADERS.items() if builds(auto, architecture, class_name)), None)
