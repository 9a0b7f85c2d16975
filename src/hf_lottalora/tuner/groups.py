"""Groups of parameters for an optimizer: what is decayed, and the learning rates of LoRA+."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..layers.adapter_tensor import UNDECAYED, AdapterTensor
from ..layers.layer import ScaffoldLayer
from .model import tuner_of


def parameter_groups(
    model: PeftModel,
    lr: float,
    weight_decay: float = 0.0,
    lr_ratio: float = 1.0,
    embedding_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Every trainable parameter of a model once, in groups for an optimizer of torch.

    Decayed are A, B, embeddings, head and other matrices. Not decayed are norms, biases, DoRA's magnitudes and beta;
    the last two are with `decay_beta=True`.

    With `lr_ratio` these are the groups of LoRA+ (arXiv 2402.12354). PEFT's `create_loraplus_optimizer` must not be
    used: it goes by shape, and gives beta, magnitudes and trained norms B's rate. Its LoRA-FA takes beta for an A, and
    fails.

    Args:
        model: with a LottaLoRA adapter.
        lr: learning rate.
        weight_decay: of what is decayed.
        lr_ratio: B's learning rate is `lr * lr_ratio`; LoRA+ has about 16.
        embedding_lr: that of embeddings, trained whole or adapted; default: `lr`. LoRA+ sets it apart, since what they
            multiply is one-hot.

    Returns:
        Dictionaries with "params", "lr" and "weight_decay"; none is empty.

    Raises:
        ValueError: the model has no LottaLoRA adapter or trains nothing, or a number is out of range.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from hf_lottalora import LottaLoraConfig
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> model = get_peft_model(net, LottaLoraConfig(seed=42, r=1, target_modules=["0"], modules_to_save=["1"]))
        >>> groups = parameter_groups(model, lr=1e-3, weight_decay=0.1, lr_ratio=16)
        >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
        [(2, 0.001, 0.1), (1, 0.016, 0.1), (2, 0.001, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)  # for Trainer: optimizers=(optimizer, None)
    """
    rates = {"": lr, "B": lr * lr_ratio, "embedding": lr if embedding_lr is None else embedding_lr}
    for name, rate in {"lr": lr, "lr_ratio": lr_ratio, "embedding_lr": rates["embedding"]}.items():
        if not 0 < rate < math.inf:
            raise ValueError(f"{name} must be a positive number, got {rate!r}.")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be a number that is not negative, got {weight_decay!r}.")
    tuner = tuner_of(model)
    kinds: dict[int, tuple[str, bool]] = {}  # which rate, and whether it is decayed
    for layer in tuner.model.modules():
        for role in layer.adapter_layer_names if isinstance(layer, ScaffoldLayer) else ():
            rate_of = "B" if role == "lora_B" else "embedding" if role.startswith("lora_embedding") else ""
            for held in getattr(layer, role).values():
                norm = isinstance(held, AdapterTensor) and (held.name == UNDECAYED or role == "lora_norm_bias")
                for parameter in held.parameters() if isinstance(held, nn.Module) else (held,):
                    kinds[id(parameter)] = (rate_of, not norm)
    for adapter, plan in tuner.plans.items():
        survey = {tensor.path: tensor.survey.kind for tensor in plan.tensors}
        for path, tensor in tuner.trained.parameters_of(tuner.model, adapter).items():
            rate_of = "embedding" if survey[path] == "embedding" else ""
            kinds[id(tensor)] = (rate_of, survey[path] not in ("norm", "bias"))
    groups: dict[tuple[str, bool], list[torch.Tensor]] = {
        (rate_of, decayed): [] for decayed in (True, False) for rate_of in rates
    }
    for parameter in model.parameters():
        if parameter.requires_grad:  # what a user has made trainable besides is decayed where it is no vector
            groups[kinds.get(id(parameter), ("", parameter.dim() > 1))].append(parameter)
    if not any(groups.values()):
        raise ValueError("No parameter of the model is trained. Load it with is_trainable=True, or set_adapter first.")
    return [
        {"params": parameters, "lr": rates[rate_of], "weight_decay": weight_decay if decayed else 0.0}
        for (rate_of, decayed), parameters in groups.items()
        if parameters
    ]
