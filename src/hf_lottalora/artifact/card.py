"""The model card of an artifact: our part of it, beside what a user wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
from huggingface_hub import ModelCard

from ..plan.plan import Plan
from .loaders import loader_of

_CARD_BEGIN, _CARD_END = "<!-- hf_lottalora: begin -->", "<!-- hf_lottalora: end -->"

_ELSEWHERE = """\
`AutoModel` and `pipeline(task, model="path/to/this/folder")` cannot load it: they look for a file with all weights.
Give a pipeline the model itself: `pipeline(task, model=model, tokenizer=tokenizer)`.

"""


def write_card(plan: Plan, folder: Path) -> None:
    """Write our part of the card into the folder's README.md."""
    file = folder / "README.md"
    card = ModelCard.load(file) if file.exists() else ModelCard("---\n{}\n---\n")
    data: Any = card.data
    before, begin, rest = card.text.partition(_CARD_BEGIN)
    if begin:
        after = rest.partition(_CARD_END)[2]
    else:  # the first time: beside a user's words, but in place of PEFT's empty template
        before, after = ("" if "[More Information Needed]" in before else before.rstrip() + "\n\n"), ""
    card.text = f"{before.lstrip()}{_card_text(plan)}{after}"
    tags = {*(data.tags or []), "lottalora"}
    data.tags = sorted(tag for tag in tags if plan.survey.pretrained_from or not tag.startswith("base_model:"))
    data.library_name = "peft"
    if not plan.survey.pretrained_from:
        data.base_model = None
    card.save(file)


def _card_text(plan: Plan) -> str:
    class_name, architecture = plan.survey.class_name, plan.survey.architecture
    unsaved = sum(tensor.survey.numel for tensor in plan.with_role("kept") if not tensor.saved)
    base_name = plan.survey.pretrained_from
    loader = None if unsaved and base_name in (None, "memory") else loader_of(architecture, class_name)
    if loader is not None:
        load = f'from hf_lottalora import {loader}\n\nmodel = {loader}.from_pretrained("path/to/this/folder")'
    else:
        base = "build_the_module()"
        if architecture is not None:
            base = f'{class_name}(AutoConfig.from_pretrained("path/to/this/folder"))'
        names = "" if architecture is None else f"\nfrom transformers import AutoConfig, {class_name}"
        load = (
            f"import hf_lottalora  # registers the PEFT method; must come first\nfrom peft import PeftModel{names}\n\n"
            f'model = PeftModel.from_pretrained({base}, "path/to/this/folder")'
        )
    drawn = sum(spec.numel for spec in plan.scaffold.values())
    parts = []
    if drawn:
        parts.append(
            f"{drawn:,} backbone weights are not in this repository: they are drawn from seed {plan.seed} when the "
            "model is loaded, the same to the bit everywhere."
        )
    if unsaved:
        base = "the base model it was trained over" if base_name in (None, "memory") else f"`{base_name}`"
        parts.append(f"{unsaved:,} frozen pretrained weights are not in it either: they come from {base}.")
    else:
        parts.append("Nothing else is needed to rebuild it.")
    return f"""{_CARD_BEGIN}
# {class_name} over a {"random scaffold" if drawn else "frozen backbone"}

A [LottaLoRA](https://arxiv.org/abs/2604.08749) adapter. {" ".join(parts)}

```python
{load}
```

{_ELSEWHERE if architecture is not None else ""}
| | |
|---|---|
| seed | {plan.seed} |
| drawn, frozen parameters | {drawn:,} |
| trained parameters | {plan.trainable_parameters:,} |
| of which A, B and beta | {plan.adapter_parameters:,} |

Needs `pip install hf-lottalora`.

### Framework versions

- PEFT {peft.__version__}
{_CARD_END}
"""
