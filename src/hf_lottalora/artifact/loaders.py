"""Which classes of ours load an artifact, and which auto classes of transformers each stands for."""

from __future__ import annotations

import re
from typing import Any

import transformers

# Of ours, one for each that the transformers here has, by name.
LOADERS = {
    name.replace("AutoModel", "AutoLottaLoraModel"): getattr(transformers, name)
    for name in dir(transformers)
    if re.fullmatch(r"AutoModel(For\w+)?", name)
}
_GENERAL = ("AutoLottaLoraModel", "AutoLottaLoraModelForPreTraining", "AutoLottaLoraModelForMultimodalLM")


def builds(auto: Any, architecture: Any, class_name: str) -> bool:
    """Whether this auto class of transformers makes a `class_name` of the architecture."""
    if type(architecture) not in auto._model_mapping:
        return False
    built = auto._model_mapping[type(architecture)]
    return any(c.__name__ == class_name for c in (built if isinstance(built, tuple) else (built,)))


def loader_of(architecture: Any, class_name: str) -> str | None:
    """Name of the class of ours that builds a `class_name`, None where there is none.

    Of several, the one that has the class's own name for the head, else the one that fewest architectures have.
    """

    def rank(ours: str) -> tuple[bool, bool, int]:
        head = ours.removeprefix("AutoLottaLoraModel") or "Model"
        return not class_name.endswith(head), ours in _GENERAL, len(LOADERS[ours]._model_mapping)

    return min(
        (ours for ours, auto in LOADERS.items() if builds(auto, architecture, class_name)), key=rank, default=None
    )


def main_input(class_name: str) -> str | None:
    """What a class of transformers takes first, such as "pixel_values"."""
    return getattr(getattr(transformers, class_name, None), "main_input_name", None)


def pipeline_tag(architecture: Any, class_name: str) -> str | None:
    """The hub's name for what a model does, by transformers' own tables; None where they have none."""
    from transformers.modelcard import TASK_MAPPING  # both import much, for saving only
    from transformers.pipelines import SUPPORTED_TASKS

    if architecture is None:
        return None
    auto = LOADERS.get(loader_of(architecture, class_name) or "")
    tasks = [task for task, entry in SUPPORTED_TASKS.items() if auto is not None and auto in entry["pt"]]
    tasks += [task for task, names in TASK_MAPPING.items() if class_name in _flat(names.values())]
    pixels = main_input(class_name) == "pixel_values"
    if pixels and "image-feature-extraction" in tasks:
        return "image-feature-extraction"
    return next(iter(tasks), None)


def _flat(names: Any) -> set[str]:
    return {name for entry in names for name in ((entry,) if isinstance(entry, str) else entry)}
