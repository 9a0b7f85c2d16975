"""Makes LottaLoRA a PEFT method. The only place that touches PEFT's closed enum, its mappings and its classes."""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

from peft import PeftModel
from peft.auto import _BaseAutoPeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "LOTTALORA"


def _add_peft_type() -> None:
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)  # what the enum machinery does for a member of a str enum
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)


def _save_whole() -> None:
    """`PeftModel.save_pretrained` writes our adapters whole or not at all, and ignores no argument of theirs."""
    save = PeftModel.save_pretrained
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        from .artifact.manifest import for_a_file
        from .artifact.peft_methods import is_ours, save_and_push
        from .artifact.writing import staged

        if not is_ours(self):
            return save(self, save_directory, *args, **kwargs)
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        if kwargs.pop("push_to_hub", False):
            kwargs |= {name: given[name] for name in list(signature.parameters)[2 : 2 + len(args)]}
            return save_and_push(save_pretrained, self, save_directory, **kwargs)
        if not given.get("safe_serialization", True):
            raise ValueError(
                "safe_serialization=False would write a pickle, adapter_model.bin; LottaLoRA artifacts are safetensors "
                "only. Nothing was written. Save without that argument."
            )
        if os.path.isfile(save_directory) or not given.get("is_main_process", True):
            return save(self, save_directory, *args, **kwargs)
        names = given.get("selected_adapters") or list(self.peft_config)
        plans = {name: self.get_plan(name) for name in names if name in self.base_model.plans}
        with for_a_file(), staged(save_directory, plans) as folder:
            save(self, folder, *args, **kwargs)

    PeftModel.save_pretrained = save_pretrained


def _load_without_a_base() -> None:
    """`AutoPeftModelForX.from_pretrained(path)` for an artifact that has no base model: as our own loader for X."""
    load = _BaseAutoPeftModel.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        from .artifact.auto_classes import loader_for
        from .artifact.base import UNASKED, reading_base

        path = pretrained_model_name_or_path
        kwargs |= zip(("is_trainable", "config", "revision", "import_allowlist"), args, strict=False)
        loader, base = loader_for(cls._target_class, path, **kwargs)
        if base is not None:
            with reading_base(base, path):
                return load(cls, path, adapter_name, **{**UNASKED, **kwargs})
        if loader is None:
            return load(cls, path, adapter_name, **kwargs)
        kwargs.pop("import_allowlist", None)  # nothing is imported by name
        options = {key: value for key, value in kwargs.items() if value is not None}
        return loader.from_pretrained(path, adapter_name=adapter_name, **options)

    _BaseAutoPeftModel.from_pretrained = classmethod(from_pretrained)


def register() -> None:
    """Register the method; again is harmless.

    Raises:
        RuntimeError: another package has registered a PEFT method of this name.
    """
    _add_peft_type()
    from .artifact.peft_methods import install
    from .config import LottaLoraConfig
    from .tuner import engines
    from .tuner.model import LottaLoraModel

    member = PeftType(NAME)
    taken_by = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if taken_by is LottaLoraConfig:
        return
    if taken_by is not None:
        raise RuntimeError(f"The PEFT method {NAME} is already registered by {taken_by.__module__}.")
    # The prefix must be LoRA's: under another one PEFT freezes A and B and stops reporting missing keys.
    register_peft_method(name=NAME.lower(), config_cls=LottaLoraConfig, model_cls=LottaLoraModel, prefix="lora_")
    _save_whole()
    install()
    engines.install()
    _load_without_a_base()
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is LottaLoraModel and PEFT_TYPE_TO_PREFIX_MAPPING[member] == "lora_"
