"""`lottalora inspect`: what an artifact's files say, without a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from safetensors import safe_open

from ..artifact.files import locate, read_weights
from ..artifact.publish import FILES
from ..artifact.reader import ArtifactError, read_adapter_config, read_json
from ..artifact.stored import loss_in, loss_text
from ..plan.plan import MANIFEST_KEY
from ..plan.storage import ROWS_KEY, SCALES_KEY
from .opened import artifact_folder
from .outcome import Outcome, grouped, table

_BITS = {"BOOL": 8, "BF16": 16}

# Which dimension of these is a rank.
_RANK_IN = {"lora_A.weight": 0, "lora_embedding_A": 0, "lora_B.lambda": 1}


def inspect(path: str, **where: Any) -> Outcome:
    """Read the headers of an artifact.

    Args:
        path: a folder or a hub repository.
        where: `subfolder`, `revision`, `token`.

    Raises:
        ArtifactError, OSError: it cannot be read.
    """
    folder, hub = artifact_folder(path, **where)
    weights, shapes, content = read_weights(folder)
    config = read_adapter_config(_file(folder, CONFIG_NAME))
    if config["peft_type"] != "LOTTALORA":
        raise ArtifactError(f"{folder}: expected a LOTTALORA adapter, found {config['peft_type']}.")
    options = {**config, **content.get("options", {})}
    with safe_open(weights, framework="pt") as file:
        dtypes = {key: file.get_slice(key).get_dtype() for key in shapes}
    tensors = [
        {"name": key, "dtype": dtypes[key], "shape": list(shapes[key]), "bytes": _size(dtypes[key], shapes[key])}
        for key in sorted(shapes)
        if key != MANIFEST_KEY
    ]
    stored = content.get("stored")
    ranks: dict[str, int] = {}
    for key, shape in shapes.items():
        at = next((at for name, at in _RANK_IN.items() if key.endswith(name)), None)
        if at is not None:
            ranks[str(shape[at])] = ranks.get(str(shape[at]), 0) + 1
    if options.get("adapter") == "nola":  # whose files have no tensor with a rank
        ranks = {str(options["r"]): len(content["scaling"])}
    architecture = content.get("architecture")
    data = {
        "path": str(path),
        "commit": hub.get("revision"),
        "class": content.get("class"),
        "model_type": architecture["values"].get("model_type") if architecture else _said(folder, "model_type"),
        "seed": content["seed"],
        "adapter_seed": options.get("adapter_seed"),
        "family": options.get("family", "normal"),
        "adapter": options.get("adapter", "lora"),
        "family_pattern": options.get("family_pattern") or {},
        "redraw": options.get("redraw", "all"),
        "base_model": config.get("base_model_name_or_path"),
        "ranks": ranks,
        "digest": content.get("artifact"),
        "scaffold_digest": content["digest"],
        "scaffold_tensors": len(content["scaffold"]),
        "tensors_of_base_model": len(content["kept"]),
        "format_version": content["format_version"],
        "generator": content["generator"],
        "versions": {
            "hf_lottalora": config.get("lottalora_version"),
            "peft": config.get("peft_version"),
            "transformers": _said(folder, "transformers_version"),
        },
        "files": {name: Path(file).stat().st_size for name in FILES if (file := locate(folder, name))},
        "parameters": sum(math.prod(t["shape"]) for t in tensors if t["name"] not in (ROWS_KEY, SCALES_KEY)),
        "saved_in": stored["dtype"] if stored else None,
        "loss": {group: loss._asdict() for group, loss in loss_in(stored).items()},
        "options": options,
        "tensors": tensors,
    }
    return Outcome(data, _text(data, loss_text(stored)))


def _file(folder: Path, name: str) -> str:
    file = locate(folder, name)
    if file is None:
        raise ArtifactError(f"{folder} has no {name}, expected a folder made by save_pretrained.")
    return file


def _said(folder: Path, key: str) -> Any:
    file = locate(folder, "config.json")
    return None if file is None else read_json(file).get(key)


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    bits = _BITS.get(dtype) or int("".join(filter(str.isdigit, dtype.partition("_")[0])))
    return math.prod(shape) * bits // 8


def _text(data: dict[str, Any], loss: str | None) -> str:
    families = sorted({data["family"], *data["family_pattern"].values()})
    summary = {
        "artifact": data["path"] + (f" at {data['commit']}" if data["commit"] else ""),
        "class": data["class"] and f"{data['class']} ({data['model_type']})",
        "seed": str(data["seed"]),
        "adapter seed": data["adapter_seed"] and str(data["adapter_seed"]),
        "family": ", ".join(families),
        "adapter": data["adapter"] if data["adapter"] != "lora" else None,
        "redraw": data["redraw"],
        "base model": data["base_model"],
        "ranks": ", ".join(f"{rank} ({count} layers)" for rank, count in data["ranks"].items()) or "no A and B",
        "digest": data["digest"] or "none: an artifact of version 0.1",
        "scaffold": f"{data['scaffold_tensors']} tensors, format {data['format_version']}, {data['scaffold_digest']}",
        "of base model": data["tensors_of_base_model"] or None,
        "stored values": data["parameters"],
        "saved in": loss,
        **{name: f"{size:,} bytes" for name, size in data["files"].items()},
        "versions": ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version),
    }
    by_name = {tensor["name"]: tensor for tensor in data["tensors"]}
    groups = grouped(by_name)
    width = max(map(len, groups), default=0)
    lines = [f"{'tensor':<{width}} {'count':>5} {'bytes':>12}  each"]
    for label, names in groups.items():
        kinds = {f"{by_name[name]['dtype']} {by_name[name]['shape']}" for name in names}
        size = sum(by_name[name]["bytes"] for name in names)
        each = kinds.pop() if len(kinds) == 1 else f"{len(kinds)} shapes"
        lines.append(f"{label:<{width}} {len(names):>5} {size:>12,}  {each}")
    return "\n".join([table(summary), "", *lines])
