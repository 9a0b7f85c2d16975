"""What a config is in files and manifests: its options as they were given, and what is recorded of the model."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterable
from typing import Any, Self

from peft import LoraConfig

from .options import REFUSED

# Fields that do not decide which model it is: where it was, what wrote it, where it goes and how it is stored; and
# digests, which the manifest has anyway.
_NOT_OPTIONS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "kept_digests", "lottalora_version", "peft_version",
    "residency", "revision", "runtime_config", "save_dtype", "scaffold_digests",
}  # fmt: skip


_OF_SOURCES = ("adapter", "bases", "basis_family", "bases_shared")  # files of LoRA do without


class DefaultTargets(set[str]):
    """What was chosen for a config without `target_modules`, where PEFT wants to see names; it goes on meaning None."""


_CHOOSE = ("exclude_modules", "layers_to_transform", "layers_pattern", "head")  # layers, with target_modules


class Recorded(LoraConfig):
    """The part of `LottaLoraConfig` that says what it is, to files and to their readers."""

    _plan: Any
    _other_dtypes: dict[str, str]
    _choice_read: Any
    adapter: str

    @property
    def token_indices(self) -> Any:
        """`trainable_token_indices` as they were given; of a config that is in use, PEFT finds them empty."""
        return getattr(self.trainable_token_indices, "given", self.trainable_token_indices)

    def to_dict(self) -> dict[str, Any]:
        """The config as a dictionary, without the options of `LoraConfig` that LottaLoRA refuses."""
        left_out = {*REFUSED, *(_OF_SOURCES if self.adapter == "lora" else ())}
        entries = {key: value for key, value in super().to_dict().items() if key not in left_out}
        entries["target_modules"] = listed(entries["target_modules"])
        entries["exclude_modules"] = listed(entries["exclude_modules"])
        entries["trainable_token_indices"] = self.token_indices
        names = self.modules_to_save  # to which PEFT appends those of a task, again and again
        entries["modules_to_save"] = None if names is None else list(dict.fromkeys(names)) or None
        return entries

    def decisive_options(self) -> dict[str, Any]:
        """The options that decide which model it is, as JSON has them; the artifact's manifest holds them too."""
        entries = {key: value for key, value in self.to_dict().items() if key not in _NOT_OPTIONS}
        if isinstance(self.target_modules, DefaultTargets):
            entries["target_modules"] = None
        return dict(json.loads(json.dumps(entries, default=_as_json)))

    def chooses_anew(self) -> bool:
        """Whether the options say which layers carry adapters, beside `resolved_targets`: not as a file has them."""
        if self._choice_read is None:
            return self._choice()[0] is not None
        return bool(self._choice() != self._choice_read)

    def _choice(self) -> tuple[Any, ...]:
        targets = None if isinstance(self.target_modules, DefaultTargets) else listed(self.target_modules)
        return targets, *(listed(getattr(self, name)) for name in _CHOOSE)

    def as_saved(self) -> Self:
        """With what is recorded of the model that it is used for, if any."""
        recorded: dict[str, Any] = {}
        if self._plan is not None:
            recorded = {**self._plan.recorded_digests(), **self._plan.recorded_options()}
            recorded["other_dtypes"] = self._other_dtypes
            recorded |= self._as_planned(recorded.keys())
        if isinstance(self.target_modules, DefaultTargets):
            recorded["target_modules"] = None
        return dataclasses.replace(self, **recorded)

    def _as_planned(self, but: Iterable[str]) -> dict[str, Any]:
        """Options that were changed since the model was made of them, as they were."""
        now, planned = self.decisive_options(), self._plan.options
        passed = {*but, "modules_to_save"}  # to which PEFT's task classes append heads that the model may not have
        changed = {key: value for key, value in planned.items() if key not in passed and now.get(key) != value}
        if changed:
            names = ", ".join(f"{key}={now.get(key)!r}" for key in changed)
            warnings.warn(
                f"{names} was set after the model was made with {', '.join(f'{k}={v!r}' for k, v in changed.items())}. "
                "It has no effect, and the artifact says what the model was made with.",
                UserWarning,
                stacklevel=4,
            )
        return changed


def _as_json(value: Any) -> Any:
    """Of what a field takes and JSON does not have: sets, and numbers of NumPy and torch."""
    return sorted(value) if isinstance(value, (set, frozenset)) else value.item()


def listed(names: Any) -> Any:
    """A set as a list, anything else as it is."""
    return sorted(names) if isinstance(names, set) else names
