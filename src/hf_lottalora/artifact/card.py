"""The model card of an artifact: our part of it, beside what a user wrote and what a Trainer reported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import metadata, version
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from ..plan.plan import MANIFEST_KEY, PREFIX, Plan
from ..plan.report import trained_in
from .card_parts import Parts, split
from .loaders import loader_of, main_input, pipeline_tag
from .manifest import read_manifest
from .stored import loss_text

_HERE = "path/to/this/folder"

_ELSEWHERE = """\
`AutoModel` and `pipeline(task, model="{path}")` cannot load it: they look for a file with all weights.
Give a pipeline the model itself, with what prepares its inputs: `pipeline(task, model=model, {preprocessor})`.
"""


def write_card(plan: Plan, folder: Path) -> None:
    """Write our part of the card into the folder's README.md, beside the weights that it describes."""
    file = folder / "README.md"
    old = split(file.read_text(encoding="utf-8-sig") if file.exists() else None)
    file.write_text(card_text(plan, folder, old), encoding="utf-8")


def card_text(plan: Plan, folder: Path, old: Parts, tags: Iterable[str] = (), **place: str | None) -> str:
    """The text of a README.md.

    Args:
        plan: of the adapter.
        folder: where its weights are.
        old: the card that is there; what a user wrote stays.
        tags: further ones.
        place: where it will be loaded from, as the arguments of `from_pretrained`: `path`, `revision`, `subfolder`.
    """
    data: Any = old.data
    architecture, base = plan.survey.architecture, hub_base(plan)
    task = pipeline_tag(architecture, plan.survey.class_name)
    own = ["lottalora", task, *(("transformers", architecture.model_type) if architecture is not None else ())]
    own += [f"base_model:adapter:{base}"] if base else []
    kept = (tag for tag in data.tags or () if not tag.startswith("base_model:"))
    data.tags = sorted({tag for tag in (*kept, *own, *tags) if tag})
    data.library_name = "peft"
    data.pipeline_tag = data.pipeline_tag or task
    of_memory = _pretrained_base(plan) == "memory"  # what they are only a user can know
    data.base_model = (data.base_model if of_memory else base) or None
    old.trainer = reported(plan, old.trainer)
    return old.text(data, _our_part(plan, folder, old, {key: value for key, value in place.items() if value}))


def _pretrained_base(plan: Plan) -> str | None:
    """Where weights come from that were not drawn: a name, "memory", or None where there are none."""
    used = any(tensor.base is None and tensor.survey.kind != "buffer" for tensor in plan.tensors)
    return plan.survey.pretrained_from if used else None


def hub_base(plan: Plan) -> str | None:
    """The repository that has the pretrained weights which a model uses, None where it uses none or they lie here."""
    name = _pretrained_base(plan)
    if name in (None, "memory") or Path(str(name)).exists():
        return None
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return None
    return name


def reported(plan: Plan, trainers: str) -> str:
    """What a Trainer reported, without a base that was not used or a data set without a name; it cannot know."""
    trainers = trainers.replace(" on the None dataset", "")
    base = _pretrained_base(plan)
    if base is not None and hub_base(plan) is not None:
        return trainers
    was = "model trained from scratch" if base is None else "fine-tuned version of a pretrained model"
    return re.sub(r"fine-tuned version of \[[^\]]*\]\(https://huggingface.co/[^)]*\)", was, trainers)


def _our_part(plan: Plan, folder: Path, old: Parts, place: dict[str, str]) -> str:
    class_name, architecture = plan.survey.class_name, plan.survey.architecture
    unsaved = sum(tensor.survey.numel for tensor in plan.with_role("kept") if not tensor.saved)
    base_name = plan.survey.pretrained_from
    drawn = sum(spec.numel for spec in plan.scaffold.values())
    parts = []
    if drawn:
        parts.append(
            f"{drawn:,} backbone weights are not in this repository: they are drawn from seed {plan.seed} when the "
            "model is loaded, the same to the bit everywhere."
        )
    if unsaved:
        base = "the base model it was trained over" if base_name in (None, "memory") else f"`{base_name}`"
        also = " either" if drawn else ""
        parts.append(f"{unsaved:,} frozen pretrained weights are not in it{also}: they come from {base}.")
    else:
        parts.append("Nothing else is needed to rebuild it.")
    loader = None if unsaved and base_name in (None, "memory") else loader_of(architecture, class_name)
    rows = "\n".join(f"| {name} | {value} |" for name, value in _figures(plan, folder).items())
    versions = {"hf_lottalora": version("hf-lottalora"), "PEFT": peft.__version__}
    versions |= {"Transformers": transformers.__version__, "Pytorch": torch.__version__}
    return f"""\
# {class_name} over a {"random scaffold" if drawn else "frozen backbone"}

A [LottaLoRA](https://arxiv.org/abs/2604.08749) adapter. {" ".join(parts)}

{_install()}

```python
{_snippet(class_name, architecture, loader, place)}
```

{_ELSEWHERE.format(path=place.get("path", _HERE), preprocessor=_preprocessor(plan)) if architecture is not None else ""}
| | |
|---|---|
{rows}

### Framework versions

{chr(10).join([*(f"- {name} {number}" for name, number in versions.items()), *old.versions])}
"""


def _preprocessor(plan: Plan) -> str:
    """What a pipeline wants beside a model, as its argument."""
    names = {"pixel_values": "image_processor=processor", "input_values": "feature_extractor=processor"}
    names["input_features"] = names["input_values"]
    return names.get(main_input(plan.survey.class_name) or "", "tokenizer=tokenizer")


def _snippet(class_name: str, architecture: Any, loader: str | None, place: dict[str, str]) -> str:
    where = {"path": _HERE, **place}
    path = f'"{where.pop("path")}"'
    call = ", ".join([path, *(f'{key}="{value}"' for key, value in where.items())])
    if loader is not None:
        return f"from hf_lottalora import {loader}\n\nmodel = {loader}.from_pretrained({call})"
    base = "build_the_module()" if architecture is None else f"{class_name}(AutoConfig.from_pretrained({call}))"
    names = "" if architecture is None else f"\nfrom transformers import AutoConfig, {class_name}"
    return (
        f"import hf_lottalora  # registers the PEFT method; must come first\nfrom peft import PeftModel{names}\n\n"
        f"model = PeftModel.from_pretrained({base}, {call})"
    )


def _install() -> str:
    """How to install the package: from its repository, since no index has it."""
    entries = metadata("hf-lottalora").get_all("Project-URL") or ()
    urls = dict(re.split(r",\s*", str(entry), maxsplit=1) for entry in entries)
    url = next((urls[name] for name in ("Repository", "Source", "Homepage") if name in urls), None)
    if url is None:
        return "It needs hf_lottalora, which no package index has: `pip install .` in a checkout of its source."
    return f"```sh\npip install 'hf-lottalora @ git+{url}'\n```"


def _figures(plan: Plan, folder: Path) -> dict[str, str]:
    drawn = plan.scaffold.values()
    ranks = sorted({adapter.r for adapter in plan.adapters if not adapter.rows})
    trained, total = plan.trainable_parameters, plan.total_parameters
    file = folder / SAFETENSORS_WEIGHTS_NAME
    dense = sum(t.survey.numel * t.survey.dtype.itemsize for t in plan.tensors if t.survey.kind != "buffer")
    manifest = _manifest(file)
    figures = {"seed": str(plan.seed), "family": ", ".join(sorted({spec.family for spec in drawn})) or "nothing drawn"}
    if plan.bases is not None:
        figures["adapter"] = f"{plan.options['adapter']}, bases {plan.bases.family} from seed {plan.bases.seed}"
    if ranks:
        figures["rank"] = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return figures | {
        "drawn, frozen parameters": f"{sum(spec.numel for spec in drawn):,}",
        "trained parameters": f"{trained:,}, {trained / max(total, 1):.2%} of {total:,}",
        f"of which {trained_in(plan.adapters)}": f"{plan.adapter_parameters:,}",
        "size of the weights here": f"{file.stat().st_size:,} bytes; all of the model's are {dense:,} bytes",
        **_stored(plan, manifest.get("stored") or {}),
        "beta": _betas(file),
        "digest": f"`{manifest['artifact']}`",
    }


def _manifest(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as tensors:
        return read_manifest(tensors.get_tensor(MANIFEST_KEY), str(file))


def _stored(plan: Plan, stored: Mapping[str, Any]) -> dict[str, str]:
    """What was left out of the weights to make them small, and of which tables nothing could be."""
    said = {}
    if loss := loss_text(stored):
        said["saved in"] = loss
    tables, parts = stored.get("tables", {}), []
    sizes = {key: (f"`{key.removeprefix(PREFIX)}`", start.shape[0]) for key, start in plan.drawn_tables().items()}
    if some := [
        f"{tables[key]['rows']:,} of {size:,} of {name}" for key, (name, size) in sizes.items() if key in tables
    ]:
        parts.append(f"{', '.join(some)}, the others are as drawn")
    if whole := [f"all {size:,} of {name}" for key, (name, size) in sizes.items() if key not in tables]:
        why = "weight decay, a head tied to the table, or use of every row leaves none as drawn"
        parts.append(f"{', '.join(whole)}: {why}")
    if parts:
        said["rows of trained embeddings here"] = "; ".join(parts)
    return said


def _betas(file: Path) -> str:
    with safe_open(file, framework="pt") as tensors:
        held = [tensors.get_tensor(key) for key in tensors.keys() if key.endswith(".lora_beta")]  # noqa: SIM118
    betas = [beta for tensor in held for beta in tensor.flatten().tolist()]
    if not betas:
        return "none"
    return f"mean {sum(betas) / len(betas):.4g}, from {min(betas):.4g} to {max(betas):.4g}, of {len(betas)} layers"
