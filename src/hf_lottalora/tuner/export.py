"""A model as an ordinary checkpoint, which transformers loads without this package (ours).

Each tensor is made when it is written, in whatever residency the scaffold is: beside the model there is one of its
tensors in memory, for a moment in float32 a few times. The model stays as it is.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..artifact.arguments import one_dtype
from ..artifact.checkpoint import Checkpoint, check_shard_size, described
from ..artifact.companions import companions
from ..artifact.hub import HUB_OPTIONS, pinned
from ..artifact.loading import load_model
from ..artifact.writing import check_empty, staged
from ..layers.layer import ScaffoldLayer
from ..paths import owner_of
from ..plan.plan import PlannedTensor
from ..residency.forms import VirtualWeight
from .model import LottaLoraModel, tuner_of
from .progress import progress

# What merging, or another way to put an adapter into a tensor, makes of it: of the layer, which of its tensors this is,
# and the adapters.
Combine = Callable[[ScaffoldLayer, str, list[str]], torch.Tensor | None]

_SHARD = "50GB"  # as transformers


def export_dense(
    model_or_path: PeftModel | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    adapter_names: list[str] | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = _SHARD,
    overwrite: bool = False,
    **loading: Any,
) -> Path:
    """Write the model that `merge_and_unload` would return, to the bit, as a checkpoint of transformers.

    Args:
        model_or_path: the model; or an artifact's folder or hub repository, whose scaffold is then drawn a tensor at a
            time, and whose tokenizer, processor and generation config go along.
        folder: where to; made where it is missing, and must be empty unless `overwrite`.
        adapter_names: which to merge, by default the active ones.
        dtype: to write floating-point tensors in; default: each in its own. They are rounded once.
        max_shard_size: of one file, in bytes or such as "5GB".
        overwrite: take a folder with files. An older checkpoint there goes first, so that a kill never leaves parts of
            two; other files stay.
        loading: of a path, what `AutoLottaLoraModelFor....from_pretrained` takes. `dtype` is passed on to it.

    Returns:
        The folder.

    Raises:
        TypeError: a plain `nn.Module`, or options of loading beside a model.
        ValueError: what cannot be merged; the message names it. Nothing was written.
        FileExistsError: there are files in the folder.
        OSError: it cannot be written.

    Example:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> from hf_lottalora import LottaLoraConfig
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        >>> model = get_peft_model(BertModel(BertConfig(vocab_size=10, **sizes)), LottaLoraConfig(seed=42, r=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     type(AutoModel.from_pretrained(export_dense(model, folder))).__name__
        'BertModel'
    """
    check_shard_size(max_shard_size)
    target, wanted = check_free(folder, overwrite), one_dtype(dtype, None)
    model, beside = opened(model_or_path, loading, wanted)
    tuner = tuner_of(model)
    names = list(dict.fromkeys(tuner.active_adapters if adapter_names is None else adapter_names))
    with (
        exported(tuner, names, _merged, wanted) as (checkpoint, value_of),
        progress("Exporting", sum(tensor.numel() for tensor in checkpoint.tensors.values())) as done,
        staged(target, {}, checkpoint.nbytes) as stage,
    ):
        write_model(tuner, checkpoint, value_of, Path(stage), wanted, max_shard_size, done)
        for file in beside:
            shutil.copyfile(file, Path(stage, file.name))
        remove_checkpoint(target)
    return target


def _merged(layer: ScaffoldLayer, attribute: str, adapters: list[str]) -> torch.Tensor | None:
    return layer.merged_weight(adapters) if attribute == "weight" else layer.merged_bias(adapters)


def check_free(folder: str | os.PathLike[str], overwrite: bool) -> Path:
    """The folder, if it can be written to.

    Raises:
        FileExistsError: as `check_empty`, or it is an artifact.
    """
    target = check_empty(folder, overwrite)
    if (target / "adapter_config.json").exists():
        raise FileExistsError(
            f"{target} has an adapter_config.json: it is an adapter's folder, and a checkpoint there would be taken "
            "for its base. Nothing was written. Export to another folder."
        )
    return target


def opened(
    model_or_path: PeftModel | str | os.PathLike[str], loading: dict[str, Any], dtype: torch.dtype | None
) -> tuple[PeftModel, list[Path]]:
    """The model, and the files beside the artifact that it is loaded from.

    Raises:
        TypeError: options of loading beside a model, or a model without a configuration of transformers.
    """
    if isinstance(model_or_path, (str, os.PathLike)):
        hub = {key: loading[key] for key in ("subfolder", *HUB_OPTIONS) if loading.get(key) is not None}
        hub |= pinned(model_or_path, **hub)
        options: dict[str, Any] = {"residency": "streamed", "dtype": dtype, **loading, **hub}
        return load_model(model_or_path, **options), companions(model_or_path, **hub)
    if loading:
        raise TypeError(f"{sorted(loading)} is for loading an artifact, but a model was given. Leave it out.")
    base = tuner_of(model_or_path).model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"A {type(base).__name__} is no model of transformers, so from_pretrained could not load it. Save the "
            "state dict of what merge_and_unload() returns."
        )
    return model_or_path, []


@contextmanager
def exported(
    tuner: LottaLoraModel, adapters: list[str], combine: Combine, dtype: torch.dtype | None, merged: bool = True
) -> Iterator[tuple[Checkpoint, Callable[[str], torch.Tensor]]]:
    """The checkpoint of a model whose adapters are combined into its tensors, and what gives each value.

    Within the context the trained tensors of these adapters are in place. `merged` says whether they are merged whole.

    Raises:
        ValueError: something cannot be combined; the message names it. Nothing was changed.
    """
    if unknown := [name for name in adapters if name not in tuner.plans]:
        raise ValueError(f"There is no adapter {unknown[0]!r}. There are {sorted(tuner.plans)}. Nothing was written.")
    if tuner._switched:
        raise ValueError("Leave scaffold_seed and scaffold_off before an export. Nothing was written.")
    model, owner, before = tuner.model, tuner.trained.owner_among(adapters), tuner.trained.installed
    combined = _combined(tuner, adapters, merged)
    planned = tuner.first_plan.tensors
    for tensor in planned:
        if tensor.survey.held is not None:
            raise ValueError(
                f"{tensor.path!r} is {tensor.survey.held}, and cannot be exported. Load the base model in memory "
                "without quantisation. Nothing was written."
            )
    tuner.trained.check_installable(model, owner)
    tuner.trained.install(model, owner)
    try:
        tensors: dict[str, torch.Tensor] = {}
        for tensor in planned:
            live = getattr(*owner_of(model, tensor.path))
            cast = dtype if live.is_floating_point() else None
            tensors.update(
                dict.fromkeys(_paths(tensor), torch.empty(live.shape, dtype=cast or live.dtype, device="meta"))
            )
        path_of = {alias: tensor.path for tensor in planned for alias in _paths(tensor)}

        def value_of(name: str) -> torch.Tensor:
            path = path_of[name]
            live = getattr(*owner_of(model, path)).detach()
            with torch.no_grad():
                value = combine(*combined[path]) if path in combined else None
                if value is None:
                    value = live.dense() if isinstance(live, VirtualWeight) else live
                return value.detach().to(tensors[name].dtype)

        yield Checkpoint(model, tensors), value_of  # type: ignore[arg-type]
    finally:
        tuner.trained.install(model, before)


def _paths(tensor: PlannedTensor) -> Iterable[str]:
    return {tensor.path, *tensor.survey.aliases}


def _combined(
    tuner: LottaLoraModel, adapters: list[str], merged: bool
) -> dict[str, tuple[ScaffoldLayer, str, list[str]]]:
    """The tensors that these adapters change, by path, each with its layer and the adapters there."""
    found: dict[str, tuple[ScaffoldLayer, str, list[str]]] = {}
    for tensor in tuner.first_plan.tensors:
        place = tuner.base.layer_of(tensor.path)
        if place is None:
            continue
        layer, attribute = place
        added = [name for name in adapters if layer._has(name) and name not in layer.merged_adapters]
        if added:
            try:
                if merged:
                    layer.check_mergeable(added)
            except ValueError as error:
                raise ValueError(f"{tensor.path!r} cannot be exported: {error} Nothing was written.") from error
            found[tensor.path] = (layer, attribute, [*layer.merged_adapters, *added])
    return found


def write_model(
    tuner: LottaLoraModel,
    checkpoint: Checkpoint,
    value_of: Callable[[str], torch.Tensor],
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    done: Callable[[int], None],
) -> None:
    """Write weights, `config.json` and, of a model that generates, `generation_config.json` into a folder."""
    model: Any = tuner.model
    own = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)
    described(model, dtype or own).save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    checkpoint.write(folder, value_of, max_shard_size, done)


def remove_checkpoint(folder: Path) -> None:
    """Remove the weights of a checkpoint: those of another number of files would be loaded instead of the new ones."""
    for file in folder.glob("model*.safetensors*"):
        if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", file.name):
            file.unlink()
