"""For `fuzz.py`: small artifacts of many sorts, the ways to load one, and what a loaded model is known by."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hf_lottalora  # isort: skip  # first: it registers the method with PEFT
import peft
import tiny
import torch
from torch import nn
from transformers import LlamaForCausalLM, ResNetConfig, ResNetForImageClassification

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
IDS = {"input_ids": torch.arange(3, 13).view(2, 5)}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}
LM, CLASSES, GENERAL = "ModelForCausalLM", "ModelForSequenceClassification", "Model"


def _llama(twin: bool, **changes: Any) -> nn.Module:
    return tiny.llama(**{**SMALL, "tie_word_embeddings": False, "rms_norm_eps": 1e-2 if twin else 1e-6, **changes})


def _tied(twin: bool) -> nn.Module:
    return _llama(twin, tie_word_embeddings=True)


def _half(twin: bool) -> nn.Module:
    return _llama(twin, dtype="float16").half()


def _bert(twin: bool) -> nn.Module:
    return tiny.bert(**SMALL, max_position_embeddings=16, hidden_act="relu" if twin else "gelu")


def _resnet(twin: bool) -> nn.Module:
    act = "silu" if twin else "relu"
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", hidden_act=act)
    return ResNetForImageClassification(config)


def _plain(twin: bool) -> nn.Module:
    return tiny.mlp()


class Sort(NamedTuple):
    """How one sort of artifact is made, and the part that its loaders' names have in common.

    Of embeddings, `rows` are trained.
    """

    build: Callable[[bool], nn.Module]
    options: dict[str, Any]
    loader: str | None = LM
    batch: Any = IDS
    rows: slice = slice(None)


SORTS = {
    "llama": Sort(_llama, {"task_type": "CAUSAL_LM"}),
    "bert": Sort(_bert, {"modules_to_save": ["pooler"], "biases": "train", "task_type": "SEQ_CLS"}, CLASSES),
    "tied lora": Sort(_tied, {"embeddings": "lora"}),
    "dora": Sort(_llama, {"use_dora": True, "alpha_pattern": {"q_proj": 3}}),
    "targets kept": Sort(_llama, {"redraw": "targets", "save_kept": True}),
    "over a base": Sort(_llama, {"redraw": "none", "task_type": "CAUSAL_LM"}),
    "rows": Sort(_llama, {"trainable_token_indices": [1, 5, 7], "family": "binary"}),
    "int8": Sort(_llama, {"save_dtype": "int8", "task_type": "CAUSAL_LM"}),
    "rows as drawn": Sort(_llama, {"save_dtype": "float16"}, rows=slice(3, 7)),
    "half": Sort(_half, {"use_rslora": True, "seed_pattern": {"k_proj": 1}}),
    "resnet": Sort(_resnet, {"target_modules": ["convolution"]}, GENERAL + "ForImageClassification", IMAGES),
    "plain": Sort(
        _plain, {"target_modules": ["0", "2"], "modules_to_save": ["4"], "rank_pattern": {"2": 3}}, None,
        torch.linspace(-1, 1, 24).view(2, 12),
    ),
}  # fmt: skip


class Made(NamedTuple):
    """One sort, made: its folder, that of a twin with the same keys and shapes, and models to load it into."""

    sort: Sort
    folder: Path
    twin: Path
    base: nn.Module
    adapted: peft.PeftModel
    output: str


def make(name: str, folder: Path) -> Made:
    """Write the artifacts of a sort below the folder.

    The twin has another alpha and dropout, another activation or epsilon, and was trained otherwise.
    """
    sort, saved = SORTS[name], {}
    for twin in (False, True):
        model = _adapted(sort, folder / "base", twin)
        _train(model, 2 if twin else 1, sort.rows)
        model.save_pretrained(place := folder / ("twin" if twin else "own"))
        if "save_dtype" in sort.options:
            model.load_adapter(place, "default")  # with the digits that are left
        saved[twin] = digest(output(model.eval(), sort.batch))
    adapted = _adapted(sort, folder / "base", False)
    _train(adapted, 3, sort.rows)  # what is loaded into it shows
    base = _base(sort, folder / "base", False)
    return Made(sort, folder / "own", folder / "twin", base, adapted.eval(), saved[False])


def _base(sort: Sort, folder: Path, twin: bool) -> nn.Module:
    torch.manual_seed(0)
    model = sort.build(twin)
    if sort.options.get("redraw") != "none":
        return model.eval()
    place = folder / str(twin)
    if not place.exists():
        model.save_pretrained(place)  # type: ignore[operator]
    return LlamaForCausalLM.from_pretrained(place).eval()


def _adapted(sort: Sort, folder: Path, twin: bool) -> peft.PeftModel:
    options = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.2} if twin else {"r": 2}
    return peft.get_peft_model(_base(sort, folder, twin), tiny.config(**options, **sort.options))


def _train(model: nn.Module, seed: int, rows: slice) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            some = parameter.data[rows] if "embed" in name else parameter.data
            some.add_((0.1 * torch.randn(some.shape, generator=generator)).to(parameter.dtype))


# ---- ways to load one -------------------------------------------------------------------------------------------------


def _auto(made: Made, path: Path) -> nn.Module:
    return getattr(hf_lottalora, f"AutoLottaLora{made.sort.loader}").from_pretrained(path, is_trainable=True)


def _auto_peft(made: Made, path: Path) -> nn.Module:
    loader = getattr(peft, f"AutoPeft{made.sort.loader}", peft.AutoPeftModel)
    return loader.from_pretrained(path, is_trainable=True)


def _over_a_base(made: Made, path: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(made.base, path, is_trainable=True)


def _second(made: Made, path: Path) -> nn.Module:
    made.adapted.load_adapter(path, "second", is_trainable=True)
    made.adapted.set_adapter("second")
    return made.adapted


def _resume(made: Made, path: Path) -> nn.Module:
    """As Trainer loads its best checkpoint; only the weights are read."""
    made.adapted.load_adapter(path, "default", is_trainable=True)
    return made.adapted


WAYS: dict[str, Callable[[Made, Path], nn.Module]] = {
    "auto": _auto,
    "auto peft": _auto_peft,
    "peft": _over_a_base,
    "second": _second,
    "resume": _resume,
}


def ways_of(sort: str) -> list[str]:
    """Those that lead to an artifact of this sort."""
    hidden = ["auto", "auto peft"] if SORTS[sort].loader is None else []
    return [way for way in WAYS if way not in hidden and (way, sort) != ("second", "resnet")]  # its averages are one's


def attempt(way: str, made: Made, path: Path) -> dict[str, Any]:
    """Load it; what came of that: `facts` of the model, or its error and what of the model was changed by then."""
    model = {"peft": made.base, "second": made.adapted, "resume": made.adapted}.get(way)
    before = tensors(model) if model is not None else {}
    try:
        loaded = WAYS[way](made, path)
    except BaseException as error:
        after = tensors(model) if model is not None else {}
        changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
        return {**raised(error), "changed": sorted(changed)[:3]}
    try:
        return facts(loaded, made.sort.batch)
    except BaseException as error:
        return {"does not run": raised(error)}


def raised(error: BaseException) -> dict[str, Any]:
    """An error: its type, its text, and whether it is one of ours."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    told = isinstance(error, (ValueError, TypeError)) and module.startswith("hf_lottalora.")
    return {
        "error": f"{type(error).__name__}: {str(error)[:300]}",
        "in": module,
        "ours": told or type(error).__module__.startswith("hf_lottalora."),
        "trace": [line.strip() for line in traceback.format_tb(error.__traceback__, limit=-6)],
    }


# ---- what a model is known by -----------------------------------------------------------------------------------------


def facts(model: Any, batch: Any) -> dict[str, Any]:
    """All that must be as it was saved, as digests; `training` is the output in training, with its dropout."""
    found = {
        "class": [type(model).__name__, type(model.get_base_model()).__name__],
        "trainable": sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad),
        "tensors": tensors(model),
        "output": digest(output(model.eval(), batch)),
    }
    torch.manual_seed(0)
    return {**found, "training": digest(output(model.train(), batch))}  # last: it moves batch norms' averages


def tensors(model: nn.Module) -> dict[str, str]:
    """The digest of each parameter and buffer, those that are no part of its state dict included."""
    known: dict[int, str] = {}
    found = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, value in named(remove_duplicate=False):
            found[name] = known[id(value)] = known.get(id(value)) or digest(value)
    return found


def digest(value: torch.Tensor) -> str:
    dense = value.dense() if hasattr(value, "scaffold") else value
    if dense.is_meta:
        return f"meta {dense.dtype} {tuple(dense.shape)}"
    data = dense.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{dense.dtype} {tuple(dense.shape)} ".encode() + data).hexdigest()[:16]


def output(model: nn.Module, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        result = model(**batch) if isinstance(batch, dict) else model(batch)
    return result if isinstance(result, torch.Tensor) else result[0]
