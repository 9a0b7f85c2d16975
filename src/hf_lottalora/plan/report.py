"""A plan as text, as a table in notebooks, and as data."""

from __future__ import annotations

import html
import re
from typing import Any

import torch

from ..scaffold.draw import FORMAT_VERSION, GENERATOR
from ..scaffold.tensor import ScaffoldTensor, combined_digest

_COLUMNS = ("role", "tensor", "count", "parameters", "bytes")


class Reported:
    """The part of `Plan` that shows it."""

    def __str__(self: Any) -> str:
        title, rows, notes = self._content()
        width = max(len(label) for _, label, *_ in rows)
        lines = [title, f"{'role':<9} {'tensor':<{width}} {'count':>5} {'parameters':>13} {'bytes':>14}"]
        lines += [f"{role:<9} {label:<{width}} {n:>5} {numel:>13,} {size:>14,}" for role, label, n, numel, size in rows]
        return "\n".join([*lines, *notes])

    def _repr_html_(self: Any) -> str:
        """Jupyter shows this."""
        title, rows, notes = self._content()
        head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
        body = "".join(
            f"<tr><td>{role}</td><td><code>{html.escape(label)}</code></td>"
            + "".join(f'<td style="text-align: right">{number:,}</td>' for number in numbers)
            + "</tr>"
            for role, label, *numbers in rows
        )
        below = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
        caption = f"<caption>{html.escape(title)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"

    def to_dict(self: Any) -> dict[str, Any]:
        """The plan as data that `json.dumps` takes: everything that `print` sums up, tensor by tensor.

        Returns:
            class_name, model_type: of the model; the second is None for a plain `nn.Module`.
            seed, format_version, generator, digest: the scaffold's; one digest for all of it.
            parameters, trainable_parameters, adapter_parameters, scaffold_parameters: how many; the first of base and
                adapters together, the third those of A, B and beta that are trained.
            artifact_bytes: about, as `print` says.
            targets, rule: paths of the modules that carry an adapter, the token embedding apart, and why these.
            left_out: what the rule would have taken: paths (numbers of layers as stars), the reason why it has not, and
                the option of the config that decides it, "" where none does.
            tensors: of the base model, each with path, aliases (all paths of a tied one), name (canonical), kind, role,
                shape, dtype, parameters, bytes, saved, in_head, and `base` and `start`: what it is without adapters,
                and how a trained copy starts. These are None for as it is, "constant" for the architecture's own, or
                the draw: seed, family, scale (standard deviation), zero_row (padding), stacked (matrices in it).
            adapters: each with path, kind, r, scaling, in_features, out_features, kernel, groups, train_beta, dora,
                layer_norm, residual, own_forward (whether it goes around a subclass's own code), bias, rows (ids, of an
                embedding of which some are trained), shapes by name, parameters, dtype, bytes.
        """
        dtype = self.adapter_dtype()
        return {
            "class_name": self.survey.class_name,
            "model_type": self.survey.model_type,
            "seed": self.seed,
            "format_version": FORMAT_VERSION,
            "generator": GENERATOR,
            "digest": combined_digest(self.seed, self.scaffold_digests()),
            "parameters": self.total_parameters,
            "trainable_parameters": self.trainable_parameters,
            "adapter_parameters": self.adapter_parameters,
            "scaffold_parameters": sum(spec.numel for spec in self.scaffold.values()),
            "artifact_bytes": self.artifact_bytes(),
            "targets": list(self.targets),
            "rule": self.rule,
            "left_out": [{**left._asdict(), "paths": list(left.paths)} for left in self.left_out],
            "tensors": [
                {
                    "path": tensor.path,
                    "aliases": list(tensor.survey.aliases),
                    "name": tensor.name,
                    "kind": tensor.survey.kind,
                    "role": tensor.role,
                    "shape": list(tensor.survey.shape),
                    "dtype": name_of(tensor.survey.dtype),
                    "parameters": tensor.survey.numel,
                    "bytes": tensor.survey.numel * tensor.survey.dtype.itemsize,
                    "saved": tensor.saved,
                    "in_head": tensor.survey.in_head,
                    "base": _origin(tensor.base),
                    "start": _origin(tensor.start) if tensor.role == "trained" else None,
                }
                for tensor in self.tensors
            ],
            "adapters": [
                {
                    **{option: getattr(adapter, option) for option in _ADAPTER_OPTIONS},
                    "kernel": list(adapter.kernel),
                    "rows": list(adapter.rows),
                    "shapes": {name: list(shape) for name, shape in adapter.shapes.items()},
                    "parameters": adapter.numel,
                    "dtype": name_of(dtype),
                    "bytes": adapter.numel * dtype.itemsize,
                }
                for adapter in self.adapters
            ],
        }

    def _content(self: Any) -> tuple[str, list[tuple[str, str, int, int, int]], list[str]]:
        """Title, rows (role, tensor, count, parameters, bytes), and what stands below them."""
        rows: dict[tuple[str, str], list[int]] = {}

        def add(role: str, path: str, numel: int, size: int) -> None:
            row = rows.setdefault((role, re.sub(r"\.\d+\.", ".*.", path)), [0, 0, 0])
            row[0] += 1
            row[1] += numel
            row[2] += size

        for tensor in self.tensors:
            add(tensor.role, tensor.path, tensor.survey.numel, tensor.survey.numel * tensor.survey.dtype.itemsize)
        for adapter in self.adapters:
            if adapter.shapes:
                what = "rows" if adapter.rows else _TRAINED[adapter.source]
                label = f"{adapter.path} ({what})"
                add("adapter", label, adapter.numel, adapter.numel * self.adapter_dtype().itemsize)
        share = self.trainable_parameters / self.total_parameters
        around = [adapter.path for adapter in self.adapters if adapter.own_forward]
        classes = sorted({module.type_name for module in self.survey.modules if module.path in around})
        return (
            f"LottaLoRA plan for {self.survey.class_name}, seed {self.seed}",
            [(*key, *row) for key, row in sorted(rows.items(), key=lambda row: row[0][0])],  # type: ignore[misc]
            [
                f"trainable {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.2%}), of "
                f"which {trained_in(self.adapters)} {self.adapter_parameters:,}",
                f"adapters  on {len(self.targets)} layers ({self.rule})" + self._beside_targets(),
                *(f"left out  {left}{left.option and f' ({left.option})'}" for left in self.left_out),
                *(
                    [f"forward   {len(around)} of them keep their own, and one output each: {', '.join(classes)}"]
                    * bool(around)
                ),
                f"artifact  about {self.artifact_bytes():,} bytes" + self._not_in_it(),
            ],
        )

    def _beside_targets(self: Any) -> str:
        others = [adapter.path for adapter in self.adapters if adapter.shapes and adapter.module not in self.targets]
        return f", and on {', '.join(others)}" if others else ""

    def _not_in_it(self: Any) -> str:
        scaffold = "; the scaffold is not in it, it is the seed" if self.scaffold else ""
        kept = sum(tensor.survey.numel for tensor in self.with_role("kept") if not tensor.saved)
        base = f"; nor are {kept:,} kept parameters, which loading takes from the base model" if kept else ""
        return scaffold + base


_ADAPTER_OPTIONS = (
    "path", "kind", "r", "scaling", "in_features", "out_features", "groups", "train_beta", "dora", "layer_norm",
    "residual", "own_forward", "bias",
)  # fmt: skip
_TRAINED = {"lora": "A, B, beta", "randlora": "gamma, lambda, beta", "nola": "coefficients, beta"}


def trained_in(adapters: Any) -> str:
    """What these adapters train in their layers, in words."""
    *first, last = _TRAINED[adapters[0].source].split(", ")
    return f"{', '.join(first)} and {last}"


def name_of(dtype: torch.dtype | None) -> str | None:
    """`float32` for torch.float32, as JSON files have it."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _origin(value: ScaffoldTensor | torch.Tensor | None) -> dict[str, Any] | str | None:
    if isinstance(value, ScaffoldTensor):
        return {key: getattr(value, key) for key in ("seed", "family", "scale", "zero_row", "stacked")}
    return None if value is None else "constant"
