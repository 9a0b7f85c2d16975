"""An ordinary checkpoint of transformers, written a tensor at a time: with the names, files and index of theirs.

`PreTrainedModel.save_pretrained` wants all tensors at once, and so does safetensors of each file. Here a twin of the
model on the meta device says which names a checkpoint has, transformers' own functions included, and each tensor is
asked for when its bytes are due.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..plan.report import name_of
from ..plan.storage import SAFETENSORS_NAMES
from .hollow import hollow
from .tensor_file import TensorFile


class _Traced(torch.Tensor):
    """A tensor without values that knows which tensors of the model it is made of."""

    sources: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        traced = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        for leaf in tree_leaves(result):
            if isinstance(leaf, cls):
                leaf.sources = frozenset[str]().union(*(tensor.sources for tensor in traced))
        return result


@dataclass(frozen=True)
class Part:
    """Tensors of a checkpoint that are made together, and those of the model that they are made of.

    Attributes:
        sources: names in the model.
        tensors: on the meta device, by their names in the checkpoint.
        as_it_is: whether it is one tensor of the model, perhaps under another name.
    """

    sources: tuple[str, ...]
    tensors: dict[str, torch.Tensor]
    as_it_is: bool


def check_shard_size(size: int | str) -> None:
    """Whether files of weights can be limited to it.

    Raises:
        ValueError: it is neither a number of bytes above 0 nor a number with a unit.
    """
    number = isinstance(size, int) and not isinstance(size, bool) and size > 0
    unit = r"(?=.*[1-9])\d+(\.\d+)? ?[KMGT]B"
    if not number and not (isinstance(size, str) and re.fullmatch(unit, size, re.IGNORECASE)):
        raise ValueError(f'max_shard_size must be a number of bytes above 0, or such as "5GB", got {size!r}.')


class Checkpoint:
    """What a checkpoint of a model consists of; `write` writes it.

    Attributes:
        parts: in the order in which they are written.
    """

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
        """Work out the names.

        Args:
            model: with whatever values; adapters may be in it.
            tensors: of its base model by every path, on the meta device, in the dtypes to write.

        Raises:
            ValueError: the model's configuration builds other tensors, one has a dtype that safetensors lacks, or
                transformers converts names in a way that cannot be followed.
        """
        self._twin = _twin_of(model)
        state = self._twin.state_dict()
        parameters = dict(self._twin.named_parameters(remove_duplicate=False))
        for name in state.keys() - parameters.keys():  # transformers 5.0 takes all that is on the meta device for those
            state[name] = torch.empty_like(state[name], device="cpu") if state[name].is_meta else state[name]
        for name, tensor in state.items():
            found = tensors.get(name)
            if found is None or found.shape != tensor.shape:
                described = "none" if found is None else f"one of shape {tuple(found.shape)}"
                raise ValueError(
                    f"The configuration of the {type(model).__name__} builds {name!r} of shape {tuple(tensor.shape)}, "
                    f"and the model has {described}: from_pretrained would not load it. Set the configuration to "
                    "what the model is."
                )
            if found.dtype not in SAFETENSORS_NAMES:
                raise ValueError(f"{name!r} has dtype {found.dtype}, which cannot be written. Pass dtype=.")
        if unknown := sorted(tensors.keys() - state.keys()):
            raise ValueError(
                f"The model has {unknown[0]!r}, which its configuration does not build: from_pretrained would not load "
                "it. Save the state dict of what merge_and_unload() returns."
            )
        for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
            state.pop(name, None)
        names = list(state)
        kept = remove_tied_weights_from_state_dict(state, self._twin)
        _check_ties(self._twin, names, kept, tensors)
        traced = {}
        for name in kept:
            traced[name] = torch.empty_like(tensors[name], device="meta").as_subclass(_Traced)
            traced[name].sources = frozenset((name,))
        # It takes entries out of what it is given.
        self.parts = _parts(revert_weight_conversion(self._twin, dict(traced)), traced, type(model).__name__)
        for part in self.parts:
            if not part.as_it_is and self._converted(part, traced.__getitem__).keys() != part.tensors.keys():
                raise ValueError(
                    f"transformers makes {next(iter(part.tensors))!r} of a {type(model).__name__} when it saves it, in "
                    "a way that cannot be followed a tensor at a time. Use merge_and_unload() and save_pretrained."
                )

    def _converted(self, part: Part, value_of: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        values = {name: value_of(name) for name in part.sources}
        if part.as_it_is:
            return {next(iter(part.tensors)): values.pop(part.sources[0])}
        return dict(revert_weight_conversion(self._twin, values))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors on the meta device, by their names in the checkpoint."""
        return {name: tensor for part in self.parts for name, tensor in part.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(
        self,
        folder: Path,
        value_of: Callable[[str], torch.Tensor],
        max_shard_size: int | str,
        done: Callable[[int], None],
    ) -> None:
        """Write the weights, in several files where they are larger than one may be, and their index then.

        Args:
            folder: which exists.
            value_of: gives the value of a tensor by its name in the model, on any device; asked once for each.
            max_shard_size: bytes, or for example "5GB"; a tensor that is larger gets a file of its own.
            done: called with numbers of values that are written.
        """
        split = split_torch_state_dict_into_shards(
            self.tensors,
            filename_pattern=SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
            max_shard_size=max_shard_size,
        )
        files = {
            name: TensorFile(folder / name, {key: self.tensors[key] for key in keys})
            for name, keys in split.filename_to_tensors.items()
        }
        for part in self.parts:
            values = self._converted(part, value_of)
            for name in part.tensors:
                value = values.pop(name)
                files[split.tensor_to_filename[name]].write(name, value)
                done(value.numel())
                del value  # before the next one is made
        if split.is_sharded:
            total = sum(tensor.numel() for tensor in self.tensors.values())
            index = {"metadata": {"total_parameters": total, **split.metadata}, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def described(model: PreTrainedModel, dtype: torch.dtype | None) -> Any:
    """The model's configuration as a checkpoint's `config.json` has it, for tensors of this dtype."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = name_of(dtype)
    return config


def _twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """What the model's configuration builds, without values and adapters."""
    with hollow():
        twin: PreTrainedModel = type(model)(copy.deepcopy(model.config))
    twin.tie_weights()  # on the meta device each module got a parameter of its own
    loaded = getattr(model, "_weight_conversions", None)
    if loaded is not None:  # names that a pretrained model had in its file
        twin._weight_conversions = loaded
    return twin


def _check_ties(
    twin: PreTrainedModel, names: Iterable[str], kept: Container[str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Whether what is written once is one tensor of the model, too."""
    held = (*twin.named_parameters(remove_duplicate=False), *twin.named_buffers(remove_duplicate=False))
    ids = {name: id(tensor) for name, tensor in held}
    first = {ids[name]: name for name in names if name in kept}
    for name in names:
        if name not in kept and tensors[name] is not tensors[first[ids[name]]]:
            raise ValueError(
                f"The configuration of the {type(twin).__name__} ties {name!r} to {first[ids[name]]!r}, which are two "
                "tensors in the model: from_pretrained would load one of them. Set tie_word_embeddings=False in it."
            )


def _parts(converted: Mapping[str, torch.Tensor], traced: Mapping[str, torch.Tensor], class_name: str) -> list[Part]:
    """What has a source in common is one part."""
    by_source: dict[str, Part] = {}
    for name, tensor in converted.items():
        sources = tensor.sources if isinstance(tensor, _Traced) else frozenset()
        if not sources:
            raise ValueError(
                f"transformers makes {name!r} of a {class_name} when it saves it, in a way that cannot be followed. "
                "Use merge_and_unload() and save_pretrained."
            )
        joined = {id(part): part for part in map(by_source.get, sorted(sources)) if part is not None}
        tensors = {key: value for part in joined.values() for key, value in part.tensors.items()}
        # A tensor of its own size: of a view the whole would be counted.
        tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        sources = sources.union(*(part.sources for part in joined.values()))
        as_it_is = len(tensors) == len(sources) == 1 and tensor is traced[next(iter(sources))]
        by_source.update(dict.fromkeys(sources, Part(tuple(sorted(sources)), tensors, as_it_is)))
    return list({id(part): part for part in by_source.values()}.values())
