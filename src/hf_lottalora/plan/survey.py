"""A survey of a model before anything is changed: every tensor's name, kind, place and own initialisation.

The plan is made from a survey and a config alone, so that everything can be validated, printed and sized first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..paths import clean_modules, owner_of
from ..residency.foreign import OFFLOADED, foreign_tensors
from .bases import check_unwrapped
from .canonical import plain
from .heads import base_prefix, embedding_module
from .heads import inner_heads as find_inner_heads
from .initialization import InitialValue, architecture_init
from .modules import RECURRENT, SurveyedModule, surveyed_modules, weight_of, writes_into_weight
from .structure import unread_classes

Kind = Literal["matrix", "embedding", "norm", "bias", "parameter", "buffer"]


@dataclass(frozen=True, eq=False)
class SurveyedTensor:
    """One distinct tensor of the base model (a tied tensor is one).

    Attributes:
        path: its path in the model, without PEFT's nesting; of the input embedding where tied.
        aliases: every path it is reachable by, `path` included.
        holders: of these, one for each module that has it. They are fewer where a module that has it, or lies above
            that one, is in several places.
        name: canonical name, `path` without the architecture's `base_model_prefix`.
        shape, dtype: of the live tensor.
        kind: what it is, by its owner: a matrix that is multiplied with, a look-up table, a norm's affine, ...
        in_head: whether it lies in the task or language-model head.
        tied_head: whether the head uses it although it is the input embedding.
        init: what the architecture's own initialisation makes of it.
        fan_in: inputs per output (matrices; for a bias those of its layer), else 0.
        fan_out: outputs per input, likewise.
        stacked: how many matrices it holds, more than 1 for fused experts.
        zero_row: padding row of an embedding.
        arbitrary: whether it is a parameter that no init code sets, and not one constant either: its values are
            whatever the module was built with.
        held: what holds it, in words, where nothing can be drawn into it: see `foreign_tensors`.
        written: whether a forward pass writes into it, as under an embedding's `max_norm`.
    """

    path: str
    aliases: tuple[str, ...]
    holders: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind
    in_head: bool
    tied_head: bool
    init: InitialValue
    fan_in: int = 0
    fan_out: int = 0
    stacked: int = 1
    zero_row: int | None = None
    arbitrary: bool = False
    held: str | None = None
    written: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Survey:
    """Everything the plan needs to know about a model. See `SurveyedTensor` and `SurveyedModule`.

    Attributes:
        architecture: the model's transformers config, None for a plain `nn.Module`.
        built_with: what of it decides what is computed, as it is now; the config may be changed later.
        initializer_range: standard deviation of the architecture's own random init, None for a plain `nn.Module`.
        pretrained_from: where its weights were loaded from, None if nowhere.
        input_embeddings, output_embeddings: module paths, where the architecture names them.
        unread_classes: whose code could not be read, by name.
        inner_heads: modules that are heads although transformers does not say so of the model: see `heads.inner_heads`.
    """

    tensors: tuple[SurveyedTensor, ...]
    modules: tuple[SurveyedModule, ...]
    class_name: str
    architecture: Any
    initializer_range: float | None
    pretrained_from: str | None
    input_embeddings: str | None
    output_embeddings: str | None
    built_with: dict[str, Any] = field(default_factory=dict, repr=False)
    unread_classes: tuple[str, ...] = ()
    inner_heads: tuple[str, ...] = ()

    @property
    def model_type(self) -> str | None:
        """`config.model_type`, None for a plain `nn.Module`."""
        return getattr(self.architecture, "model_type", None)

    @property
    def tied_tensor(self) -> SurveyedTensor | None:
        """The input embedding's tensor, where the head uses it too."""
        return next((t for t in self.tensors if t.tied_head and t.path == f"{self.input_embeddings}.weight"), None)


def survey_model(model: nn.Module) -> Survey:
    """Survey a model that carries no adapter yet. Changes nothing; the global random state stays as it is.

    Raises:
        ValueError: two tensors would have the same canonical name, or a module is wrapped, see `check_unwrapped`.
    """
    check_unwrapped(model)
    held = foreign_tensors(model)
    input_embeddings = embedding_module(model, "get_input_embeddings")
    output_embeddings = embedding_module(model, "get_output_embeddings")
    # Accelerate's cpu_offload leaves two tensors on the meta device where there was a tied one.
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    ends = [getattr(module, "weight", None) for module in (output_embeddings, input_embeddings)]
    same = {id(ends[0]): id(ends[1])} if tied and all(held.get(id(end)) == OFFLOADED for end in ends) else {}
    paths: dict[int, list[str]] = {}
    owners: dict[int, tuple[nn.Module, str]] = {}
    holders: dict[int, dict[tuple[int, str], str]] = {}
    written: set[int] = set()
    for module_path, module in clean_modules(model):
        persistent = set(module._buffers) - module._non_persistent_buffers_set
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or (attribute in module._buffers and attribute not in persistent):
                continue
            key = same.get(id(tensor), id(tensor))
            path = f"{module_path}.{attribute}" if module_path else attribute
            paths.setdefault(key, []).append(path)
            if attribute == "weight" and writes_into_weight(module):
                written.add(key)
            owners.setdefault(key, (module, attribute))
            holders.setdefault(key, {}).setdefault((id(module), attribute), path)

    names = {id(module): path for path, module in reversed(list(clean_modules(model)))}
    prefix = base_prefix(model)
    out = names.get(id(output_embeddings)) if output_embeddings is not None else None
    inner_heads = tuple(path for path in dict.fromkeys(find_inner_heads(model)) if path != out)
    heads = tuple(f"{head}." for head in (out, *inner_heads) if head)

    def in_head(path: str) -> bool:
        return (bool(prefix) and not path.startswith(f"{prefix}.")) or path.startswith(heads)

    kinds = {key: _kind(module, attribute) for key, (module, attribute) in owners.items()}
    # Large look-up tables are random in every architecture; only their size would be in the way of the probe.
    matrices = {key for key, kind in kinds.items() if kind == "matrix"}
    probe_lightly = {key for key in matrices if not isinstance(owners[key][0], ParametrizationList)}
    if input_embeddings is not None and getattr(input_embeddings, "weight", None) is not None:
        probe_lightly.add(id(input_embeddings.weight))
    init = architecture_init(model, probe_lightly)
    constant = {key for key in probe_lightly if not init[key].random}
    if constant:  # matrices that the architecture sets to a constant: now their value is wanted
        init = architecture_init(model, probe_lightly - constant)
    # A matrix that no init code touches was made by its layer's constructor, and those draw at random.
    untouched = {key for key in matrices if not init[key].random and init[key].value is None}
    init.update(dict.fromkeys(untouched, InitialValue(True, None)))

    tensors = []
    for key, aliases in paths.items():
        module, attribute = owners[key]
        tensor = getattr(module, attribute)
        embedding = next((a for a in aliases if a == f"{names.get(id(input_embeddings))}.weight"), None)
        path = embedding or aliases[0]
        tensors.append(
            SurveyedTensor(
                path=path,
                aliases=tuple(aliases),
                holders=tuple(holders[key].values()),
                name=path.removeprefix(f"{prefix}.") if prefix else path,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                kind=_kind_given_init(kinds[key], attribute, tensor, init[key]),
                in_head=in_head(path),
                tied_head=not in_head(path) and any(in_head(a) for a in aliases),
                init=init[key],
                **_fans(module, tensor),
                arbitrary=kinds[key] != "matrix" and key not in held and _is_arbitrary(tensor, init[key]),
                held=held.get(key),
                written=key in written,
                zero_row=getattr(module, "padding_idx", None) if kinds[key] == "embedding" else None,
            )
        )
    _check_distinct(tensors)
    architecture = model.config if isinstance(model, PreTrainedModel) else None
    return Survey(
        tensors=tuple(tensors),
        modules=tuple(surveyed_modules(model, in_head)),
        class_name=type(model).__name__,
        architecture=architecture,
        built_with=plain(architecture) if architecture is not None else {},
        initializer_range=_initializer_range(model.config) if isinstance(model, PreTrainedModel) else None,
        pretrained_from=_pretrained_from(model),
        input_embeddings=names.get(id(input_embeddings)),
        output_embeddings=names.get(id(output_embeddings)),
        unread_classes=tuple(sorted(unread_classes(model))),
        inner_heads=inner_heads,
    )


def with_model_dtypes(survey: Survey, model: nn.Module) -> Survey:
    """The survey with the dtypes that the model's tensors have now; the same one, if it has them."""
    dtypes = [getattr(*owner_of(model, tensor.path)).dtype for tensor in survey.tensors]
    if dtypes == [tensor.dtype for tensor in survey.tensors]:
        return survey
    tensors = (replace(tensor, dtype=dtype) for tensor, dtype in zip(survey.tensors, dtypes, strict=True))
    return replace(survey, tensors=tuple(tensors))


def _pretrained_from(model: nn.Module) -> str | None:
    # from_pretrained marks the parameters it loads; name_or_path alone is also set by a config that was loaded.
    loaded = any(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters())
    return getattr(model, "name_or_path", None) or "memory" if loaded else None


def _kind(module: nn.Module, attribute: str) -> Kind:
    if attribute in module._buffers:
        return "buffer"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, ParametrizationList):
        weight_norm = any(isinstance(part, _WeightNorm) for part in module)
        return "matrix" if weight_norm and attribute == "original1" else "parameter"
    if "norm" in type(module).__name__.lower():
        return "norm"
    if isinstance(module, RECURRENT):
        return "bias" if "bias" in attribute else "matrix"
    if isinstance(module, (nn.Linear, Conv1D, _ConvNd)) and attribute == "weight":
        return "matrix"
    return "bias" if attribute.endswith("bias") else "parameter"


def _kind_given_init(kind: Kind, attribute: str, tensor: torch.Tensor, init: InitialValue) -> Kind:
    # Routers and fused experts hold their matrices as bare parameters.
    if kind == "parameter" and init.random and tensor.ndim >= 2 and attribute.endswith(("weight", "proj")):
        return "matrix"
    return kind


def _is_arbitrary(tensor: torch.Tensor, init: InitialValue) -> bool:
    untouched = isinstance(tensor, nn.Parameter) and not init.random and init.value is None and not tensor.is_meta
    return untouched and tensor.numel() > 1 and bool(tensor.detach().amin() != tensor.detach().amax())


def _fans(module: nn.Module, tensor: torch.Tensor) -> dict[str, int]:
    weight = weight_of(module)
    if isinstance(module, (nn.Linear, Conv1D, _ConvNd)) and isinstance(weight, torch.Tensor):
        shape = weight.shape
        if isinstance(module, Conv1D):
            return {"fan_in": shape[0], "fan_out": shape[1]}
        return {"fan_in": math.prod(shape[1:]), "fan_out": shape[0] * math.prod(shape[2:])}
    if isinstance(module, ParametrizationList):  # of a linear layer or convolution: outputs first
        return {"fan_in": math.prod(tensor.shape[1:]), "fan_out": tensor.shape[0] * math.prod(tensor.shape[2:])}
    if tensor.ndim < 2:
        return {}
    d_in, d_out = tensor.shape[-1], tensor.shape[-2]
    if getattr(module, "is_transposed", False):
        d_in, d_out = d_out, d_in
    return {"fan_in": d_in, "fan_out": d_out, "stacked": math.prod(tensor.shape[:-2])}


def _initializer_range(config: Any) -> float:
    parts = [config, *(getattr(config, name, None) for name in ("text_config", "vision_config", "audio_config"))]
    for attribute in ("initializer_range", "init_std", "initializer_factor"):
        for part in parts:
            if getattr(part, attribute, None):
                return float(getattr(part, attribute))
    return 0.02  # transformers' own fallback


def _check_distinct(tensors: list[SurveyedTensor]) -> None:
    by_name: dict[str, str] = {}
    for tensor in tensors:
        if by_name.setdefault(tensor.name, tensor.path) != tensor.path:
            raise ValueError(
                f"{tensor.path!r} and {by_name[tensor.name]!r} would both be drawn under the canonical name "
                f"{tensor.name!r}, that is, be the same weights. Rename one of the two modules."
            )
