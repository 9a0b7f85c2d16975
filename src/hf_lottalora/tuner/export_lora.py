"""A model as a base checkpoint and a plain LoRA adapter over it, which transformers and PEFT load without this package.

`beta W x + (alpha / r) B A x` is plain LoRA over the base weight `beta W` (ours): A and B go into the adapter as they
are, everything else that was drawn, kept or trained into the base checkpoint.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..artifact.arguments import one_dtype
from ..artifact.checkpoint import check_shard_size
from ..artifact.writing import staged
from ..config import LottaLoraConfig
from ..layers.layer import ScaffoldLayer
from ..paths import clean_modules
from ..plan.plan import Plan, PlannedAdapter, saved_key
from ..plan.structure import sizes_read
from .export import _SHARD, check_free, exported, opened, remove_checkpoint, write_model
from .model import LottaLoraModel, tuner_of
from .progress import progress

BASE, ADAPTER = "base", "adapter"
# For other tasks PEFT expects the head, which is in the base, in the adapter too.
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")


def export_lora(
    model_or_path: PeftModel | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    base_name: str | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = _SHARD,
    overwrite: bool = False,
    **loading: Any,
) -> Path:
    """Write `base/`, a checkpoint of transformers, and `adapter/`, a LoRA adapter of PEFT over it.

    A and B are those of the model, with its ranks and alphas. The base weights are `beta W`, rounded once to their
    dtype, and everything that was trained beside the adapters; trained rows of embeddings are in place.

    Args:
        model_or_path: as in `export_dense`.
        folder: where the two folders go; the rest as in `export_dense`.
        adapter_name: which one, by default the active one.
        base_name: what `adapter_config.json` calls the base model, such as the repository that it will have; default:
            the path it has here.
        dtype: of the base; A and B keep theirs.
        max_shard_size: as in `export_dense`.
        overwrite: as there.
        loading: as there.

    Returns:
        The folder.

    Raises:
        ValueError: what plain LoRA cannot be, by name: DoRA, a residual, a LayerNorm, adapters of a tied embedding or
            of `nn.MultiheadAttention`, convolutions with groups, dilation or a padding of their own; or several
            adapters are active, or one is merged. Nothing was written.
        TypeError, FileExistsError, OSError: as `export_dense`.

    Example:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> from hf_lottalora import LottaLoraConfig
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        >>> model = get_peft_model(BertModel(BertConfig(vocab_size=10, **sizes)), LottaLoraConfig(seed=42, r=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in export_lora(model, folder).iterdir())
        ['adapter', 'base']
    """
    check_shard_size(max_shard_size)
    target, wanted = check_free(folder, overwrite), one_dtype(dtype, None)
    check_free(target / BASE, overwrite)
    model, beside = opened(model_or_path, loading, wanted)
    tuner = tuner_of(model)
    name = _the_one(tuner) if adapter_name is None else adapter_name
    _check_plain(tuner, name)
    with (
        exported(tuner, [name], _with_beta, wanted, merged=False) as (checkpoint, value_of),
        progress("Exporting", sum(tensor.numel() for tensor in checkpoint.tensors.values())) as done,
        staged(target, {}, checkpoint.nbytes) as stage,
    ):
        base, adapter = Path(stage, BASE), Path(stage, ADAPTER)
        base.mkdir()
        write_model(tuner, checkpoint, value_of, base, wanted, max_shard_size, done)
        for file in beside:
            shutil.copyfile(file, base / file.name)
        adapter.mkdir()
        _write_adapter(tuner, name, adapter, base_name or str(target.absolute() / BASE))
        remove_checkpoint(target / BASE)
    return target


def _the_one(tuner: LottaLoraModel) -> str:
    if len(tuner.active_adapters) != 1:
        raise ValueError(f"Adapters {tuner.active_adapters} are active. Pass one as adapter_name. Nothing was written.")
    return str(tuner.active_adapters[0])


def _with_beta(layer: ScaffoldLayer, attribute: str, adapters: list[str]) -> torch.Tensor | None:
    """`beta W`, and of an embedding with trained rows the table with these."""
    if attribute != "weight":
        return None  # an adapter's own bias stays in the adapter
    return layer.scaled_weight(adapters[0])


def _check_plain(tuner: LottaLoraModel, name: str) -> None:
    if name not in tuner.plans:
        return  # is said by what follows
    modules = dict(clean_modules(tuner.model))
    looked_at = sizes_read(tuner.model)
    for adapter in tuner.plans[name].adapters:
        reason = _not_plain(adapter, modules[adapter.module])
        if adapter.path in looked_at and adapter.kind == "conv":
            reason = "the model reads this convolution's stride and the like, which PEFT's layer does not tell"
        if reason is None and tuner.base.layer_of(adapter.weight) is not None:
            layer = tuner.model.get_submodule(adapter.path)
            reason = "adapters are merged into it (call unmerge_adapter() first)" if layer.merged else None
        if reason is not None:
            raise ValueError(
                f"{adapter.path!r} cannot be a layer with plain LoRA: {reason}. Nothing was written. Merge it instead: "
                "export_dense (--format dense)."
            )


def _not_plain(adapter: PlannedAdapter, module: Any) -> str | None:
    if adapter.rows:
        return None  # they are in the base
    if adapter.kind == "tied_head":
        return "it shares the adapter of the embedding that it is tied to, which PEFT's does not"
    if adapter.kind == "projection":
        return "its adapters are those of single matrices of an nn.MultiheadAttention"
    if adapter.source == "randlora":
        return "its update is RandLoRA's, of full rank"
    for option in ("dora", "residual", "layer_norm"):
        if getattr(adapter, option):
            return f"it has {'use_dora' if option == 'dora' else option}"
    if adapter.kind == "conv":
        own = adapter.own_forward or module.groups > 1 or module.padding_mode != "zeros" or set(module.dilation) != {1}
        return "PEFT's A has no groups, dilation or other padding than zeros" if own else None
    return None


def _write_adapter(tuner: LottaLoraModel, name: str, folder: Path, base_name: str) -> None:
    plan, config = tuner.plans[name], tuner.peft_config[name]
    paths = [adapter.path for adapter in plan.adapters if not adapter.rows]
    tensors = {}
    for path in paths:
        layer: Any = tuner.model.get_submodule(path)
        pair = dict(zip(_names(layer), layer._pair(name), strict=True))
        if layer.lora_bias[name]:
            pair["lora_B.bias"] = layer.lora_B[name].bias
        tensors.update({saved_key(f"{path}.{key}"): tensor.detach().cpu().contiguous() for key, tensor in pair.items()})
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    lora_config(tuner.model, plan, config, paths, base_name).save_pretrained(str(folder))


def _names(layer: ScaffoldLayer) -> tuple[str, str]:
    embedding = isinstance(layer.get_base_layer(), nn.Embedding)
    return ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")


def lora_config(model: nn.Module, plan: Plan, config: LottaLoraConfig, paths: list[str], base_name: str) -> LoraConfig:
    """The config of the plain adapter: the same ranks, alphas and dropout on exactly these layers."""
    layers = dict(clean_modules(model))
    task = config.task_type if config.task_type in _TASKS else None
    plain = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        use_rslora=config.use_rslora,
        lora_dropout=config.lora_dropout,
        lora_bias=config.lora_bias,
        fan_in_fan_out=any(isinstance(layers[path], Conv1D) for path in paths),
        target_modules=_targets(paths, layers),
        task_type=task,
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    return plain


def _targets(paths: list[str], modules: Any) -> list[str] | str:
    """How PEFT is told of exactly these modules: the ends of their paths if that will do, as users write them."""
    for names in (sorted({path.rpartition(".")[2] for path in paths}), sorted(paths)):
        if all((path in paths) == any(f".{path}".endswith(f".{name}") for name in names) for path in modules):
            return names
    return "|".join(path.replace(".", r"\.") for path in paths)
