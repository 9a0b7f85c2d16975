"""Load an artifact with nothing but the artifact: build on the meta device, draw once, return a `PeftModel`."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import PeftModel

from ..config import LottaLoraConfig
from ..paths import owner_of
from ..residency.forms import Residency, check_residency
from .arguments import instead_of, one_device, one_dtype
from .base import UNASKED, base_of, reading_base
from .config_json import build, load_architecture, most_parameters
from .current import whole
from .digests import check_digest
from .files import HUB_OPTIONS, recorded_tensors
from .hollow import BUILDING, hollow
from .hub import pinned
from .loaders import builds, loader_of
from .reader import ArtifactError


class AutoLottaLora:
    """`from_pretrained(path)` for one kind of head, see `auto_classes`. Not to be instantiated."""

    _auto_class: Any

    def __init__(self) -> None:
        raise OSError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(path).")

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        adapter_name: str = "default",
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        attn_implementation: str | None = None,
        residency: Residency | None = None,
        base_model: bool | str | os.PathLike[str] | None = None,
        digest: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **hub_kwargs: Any,
    ) -> PeftModel:
        """Rebuild the model that `save_pretrained` wrote, to the bit. Several threads may do so at once.

        Where the model's dtype is not torch's default one, transformers sets that for a moment, for every thread.

        Args:
            path: the artifact's folder, or a hub repository id.
            adapter_name: name of the adapter in the model.
            is_trainable: whether to go on training it; otherwise the model is in eval mode.
            autocast_adapter_dtype: as in `PeftModel.from_pretrained`.
            dtype: dtype of the model, or its name; default and "auto": the one it was saved in.
            device: where the model goes once it is built.
            attn_implementation: as in transformers; default: what it chooses here.
            residency: "dense", "packed", "int4" or "streamed", see `LottaLoraConfig`; default: its config's.
            base_model: with redraw "targets" or "none", the pretrained model to load it over: its name or path, or True
                for the one that the artifact names. A downloaded artifact needs this, unless it names a commit too;
                safetensors only.
            digest: what the model card says of it, had by another way: the one proof that nobody exchanged the files.
            torch_dtype: older name of `dtype`.
            device_map: instead of `device`, what is one device: its name or number, {"": device}, or "auto" = the
                accelerator where there is one.
            hub_kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Returns:
            A `PeftModel`, of the class that the artifact's `task_type` asks for.

        Raises:
            TypeError: an argument that is not taken; the message says what to use instead.
            ValueError: something is missing, damaged, or belongs to another scaffold; the message names it.
            OSError: the hub has no such repository, refuses it or cannot be reached; the message says which.
        """
        unknown = sorted(hub_kwargs.keys() - {"subfolder", *HUB_OPTIONS})
        if unknown:
            raise TypeError(
                f"{cls.__name__}.from_pretrained does not take {unknown}. {instead_of(unknown)}The architecture and "
                "the adapter's options come from the artifact; besides dtype, device, attn_implementation, "
                f"residency, base_model and digest it takes subfolder, {', '.join(HUB_OPTIONS)}."
            )
        dtype, device = one_dtype(dtype, torch_dtype), one_device(device, device_map)
        if digest is not None:
            check_digest(digest)
        torch.empty(0, device=device)  # one that is not there is said now, not when all is drawn
        hub_kwargs |= pinned(path, **hub_kwargs)  # the subfolder among them
        options = (
            adapter_name,
            is_trainable,
            autocast_adapter_dtype,
            dtype,
            attn_implementation,
            residency,
            base_model,
            digest,
        )
        model = whole(lambda: cls._load(path, *options, **hub_kwargs), path, hub_kwargs.get("subfolder"))
        return model.to(device)

    @classmethod
    def _load(
        cls,
        path: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool,
        autocast_adapter_dtype: bool,
        dtype: torch.dtype | None,
        attn_implementation: str | None,
        residency: Residency | None,
        base_model: bool | str | os.PathLike[str] | None,
        digest: str | None,
        **hub_kwargs: Any,
    ) -> PeftModel:
        config = LottaLoraConfig.from_pretrained(path, **hub_kwargs)
        if not isinstance(config, LottaLoraConfig):
            raise ValueError(f"{path} is a {config.peft_type} adapter, expected {'LOTTALORA'}. Use PeftModel for it.")
        found = (config._artifact_manifest or {}).get("artifact")
        if digest is not None and digest != found:
            raise ArtifactError(
                f"{path}: expected the artifact with digest {digest!r}, found {found!r}. Nothing was loaded. Another "
                "version was saved there, or somebody exchanged the files."
            )
        families = {config.family, *config.family_pattern.values()}
        config.residency = check_residency(residency or config.residency, families)
        file = config._artifact_architecture
        if file is None:
            raise ValueError(
                f"{path} has no config.json, so the architecture is unknown. If the model was a plain nn.Module, build "
                "it yourself and use PeftModel.from_pretrained(module, path)."
            )
        architecture = load_architecture(file)
        cls._check_class(path, architecture)
        attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
        dtype = dtype or architecture.dtype or torch.float32
        if config.redraw == "all" or config.save_kept:
            if base_model not in (None, True, False):
                raise ValueError(f"{path} needs no base model, got base_model={base_model!r}. Leave it out.")
            # Buffers must be real: rotary and position tables have no other source. Weights are drawn or read later.
            with hollow(most_parameters(recorded_tensors(config))):
                model = build(
                    file,
                    lambda: cls._auto_class.from_config(
                        architecture, dtype=dtype, trust_remote_code=False, **attention
                    ),
                )
            _check_other_dtypes(path, model, config)
            for tensor_path, other in (config.other_dtypes or {}).items() if dtype == architecture.dtype else ():
                owner, name = owner_of(model, tensor_path)
                cast = getattr(owner, name).to(getattr(torch, other))
                if name in owner._buffers:
                    owner._buffers[name] = cast
                else:
                    owner._parameters[name] = torch.nn.Parameter(cast, requires_grad=False)
            model.tie_weights()  # on the meta device each module got a parameter of its own
        else:
            base, revision = base_of(config, path, base_model)
            with BUILDING, reading_base(base, path):
                model = cls._auto_class.from_pretrained(
                    base,
                    revision=revision,
                    config=architecture,
                    dtype=dtype,
                    local_files_only=bool(hub_kwargs.get("local_files_only")),
                    **UNASKED,
                    **attention,
                )
        config._values_follow = True  # PEFT's low_cpu_mem_usage would patch torch for every thread
        return PeftModel.from_pretrained(
            model,
            path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            torch_device="cpu",
            key_mapping={},  # of older transformers' checkpoints: an artifact's names are those of the model
            config=config,
            **hub_kwargs,
        )

    @classmethod
    def _check_class(cls, path: str | os.PathLike[str], architecture: Any) -> None:
        saved = (architecture.architectures or [None])[0]
        if saved is None or builds(cls._auto_class, architecture, saved):
            return
        loader = loader_of(architecture, saved)
        advice = f"Use {loader}." if loader else f"Build the {saved} yourself and use PeftModel.from_pretrained."
        raise ValueError(f"{path} is a {saved}, which {cls.__name__} does not build. {advice}")


def _check_other_dtypes(path: str | os.PathLike[str], model: torch.nn.Module, config: LottaLoraConfig) -> None:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    unknown = sorted((config.other_dtypes or {}).keys() - {name for name, _ in named})
    if unknown:
        raise ValueError(
            f"other_dtypes in the adapter_config.json of {path} names {unknown[0]!r}, which {type(model).__name__} "
            "lacks. Nothing was loaded. The file was changed, or transformers names tensors otherwise in this release."
        )
