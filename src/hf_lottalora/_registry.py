"""Makes LottaLoRA a PEFT method. The only place that touches PEFT's closed enum and its mappings."""

from __future__ import annotations

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


def register() -> None:
    """Register the method; again is harmless.

    Raises:
        RuntimeError: another package has registered a PEFT method of this name.
    """
    _add_peft_type()
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
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is LottaLoraModel and PEFT_TYPE_TO_PREFIX_MAPPING[member] == "lora_"
