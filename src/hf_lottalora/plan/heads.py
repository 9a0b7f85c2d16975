"""Where a model's head is: what lies outside its base model, its output embeddings, and heads it does not tell of."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from ..paths import clean_modules
from .modules import weight_of

_HEAD = re.compile(r"([a-z_]+\.)*([a-z_]+_)?(head|classifier|score)")  # of repeated layers a classifier is a router


def embedding_module(model: nn.Module, getter: str) -> nn.Module | None:
    """What `get_input_embeddings` or `get_output_embeddings` gives, None where an architecture has none."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        module = getattr(model, getter)()
    except NotImplementedError:  # transformers' way to say that an architecture has none
        return None
    return module if isinstance(module, nn.Module) else None


def base_prefix(model: nn.Module) -> str:
    """Name of the base model in a model with a head, "" where it has none of its own."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return ""
    return str(model.base_model_prefix)


def inner_heads(model: nn.Module) -> Iterator[str]:
    """Paths of the output layers of models within the model; where it has no base model, also of what is called a head.

    CLIP's and SigLIP's image classifiers have a tower and a `classifier`, Parakeet an encoder and a `ctc_head`.
    """
    if not isinstance(model, PreTrainedModel):
        return
    alone = not base_prefix(model) and "For" in type(model).__name__
    for path, module in clean_modules(model):
        if isinstance(module, PreTrainedModel) and path:
            head = embedding_module(module, "get_output_embeddings")
            head = None if isinstance(head, nn.Embedding) else head
            yield from (f"{path}.{below}" for below, part in module.named_modules() if part is head)
        elif alone and _HEAD.fullmatch(path) and weight_of(module) is not None:
            yield path
