"""Makes LottaLoRA a PEFT method. The only place that touches PEFT's closed enum, its mappings and its classes."""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftModel
from peft.auto import _BaseAutoPeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "LOTTALORA"
_SAVING = (
    "safe_serialization",
    "selected_adapters",
    "save_embedding_layers",
    "is_main_process",
    "path_initial_model_for_weight_conversion",
)


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


def _push_on_save() -> None:
    """`save_pretrained(push_to_hub=True)`, which PEFT takes and then ignores."""
    save = PeftModel.save_pretrained

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        from .artifact.hub_methods import is_ours, save_and_push

        if is_ours(self) and kwargs.pop("push_to_hub", False):
            kwargs |= zip(_SAVING, args, strict=False)
            save_and_push(save, self, save_directory, **kwargs)
        else:
            save(self, save_directory, *args, **kwargs)

    PeftModel.save_pretrained = save_pretrained


def _load_without_a_base() -> None:
    """`AutoPeftModelForX.from_pretrained(path)` for an artifact that has no base model: as our own loader for X."""
    load = _BaseAutoPeftModel.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        from .artifact.auto_classes import loader_for

        path = pretrained_model_name_or_path
        kwargs |= zip(("is_trainable", "config", "revision", "import_allowlist"), args, strict=False)
        loader = loader_for(cls._target_class, path, **kwargs)
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
    from .artifact.hub_methods import install
    from .config import LottaLoraConfig
    from .tuner.model import LottaLoraModel

    member = PeftType(NAME)
    taken_by = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if taken_by is LottaLoraConfig:
        return
    if taken_by is not None:
        raise RuntimeError(f"The PEFT method {NAME} is already registered by {taken_by.__module__}.")
    # The prefix must be LoRA's: under another one PEFT freezes A and B and stops reporting missing keys.
    register_peft_method(name=NAME.lower(), config_cls=LottaLoraConfig, model_cls=LottaLoraModel, prefix="lora_")
    _push_on_save()
    install()
    _load_without_a_base()
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is LottaLoraModel and PEFT_TYPE_TO_PREFIX_MAPPING[member] == "lora_"
