"""The plan: which role each tensor gets, made and validated before the model is touched."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..layers.coefficients import coefficient_shapes
from ..options import AdapterSource, Magnitude, SaveDtype
from ..scaffold.draw import FORMAT_VERSION, GENERATOR
from ..scaffold.tensor import ScaffoldTensor, combined_digest
from .canonical import canonical_json, describe, digest_of
from .left_out import LeftOut
from .report import Reported, name_of
from .storage import (
    FORMS,
    SCALES_KEY,
    STACKED,
    STACKED_KEY,
    Shrinkable,
    described,
    file_bytes,
    of_adapter,
    of_trained,
)
from .survey import Survey, SurveyedTensor

MANIFEST_KEY = "lottalora_manifest"
PREFIX = "base_model.model."  # PEFT's prefix of every key in an adapter file

Role = Literal["scaffold", "trained", "kept"]
AdapterKind = Literal["linear", "conv", "embedding", "tied_head", "projection", "rows"]


def saved_key(path: str) -> str:
    """Key in the adapter file of the tensor with this clean path."""
    return PREFIX + path


@dataclass(frozen=True, eq=False)
class PlannedTensor:
    """What becomes of one tensor of the base model.

    Attributes:
        survey: the tensor.
        role: "scaffold" (drawn, frozen, never saved), "trained" (saved) or "kept" (frozen, not drawn).
        base: how its value without adapters arises: drawn, the architecture's constant, or None = as it is.
        start: how the copy that an adapter trains starts; meaningful for trained tensors only.
        saved: whether the artifact contains it.
    """

    survey: SurveyedTensor
    role: Role
    base: ScaffoldTensor | torch.Tensor | None
    start: ScaffoldTensor | torch.Tensor | None
    saved: bool

    @property
    def path(self) -> str:
        """The tensor's path in the model."""
        return self.survey.path

    @property
    def name(self) -> str:
        """The tensor's canonical name."""
        return self.survey.name


@dataclass(frozen=True)
class PlannedAdapter:
    """A, B, beta and their options over one module; a tied head shares those of the input embedding.

    For one of several matrices of a module, `matrix` is its path there, and the adapter's own lies below the module's.
    With `own_forward` they go around the code of a subclass, see `plan.probe`. Of kind "rows" it is `rows` of an
    embedding, so many as its r, which are trained as they are. With another `source` than LoRA its A and B are made of
    what is trained; NOLA combines so many `bases`.
    """

    path: str
    kind: AdapterKind
    in_features: int
    out_features: int
    r: int
    scaling: float
    kernel: tuple[int, ...] = ()
    groups: int = 1
    train_beta: bool = True
    dora: Magnitude | None = None
    layer_norm: bool = False
    residual: bool = False
    own_forward: bool = False
    bias: bool = False
    matrix: str = ""
    rows: tuple[int, ...] = ()
    source: AdapterSource = "lora"
    bases: int = 0

    @property
    def module(self) -> str:
        """Path of the module that PEFT wraps."""
        return self.path.rpartition(".")[0] if self.matrix else self.path

    @property
    def weight(self) -> str:
        """Path of the adapted tensor."""
        return f"{self.module}.{self.matrix or 'weight'}"

    @property
    def biased(self) -> str:
        """Path of the bias beside the adapted tensor."""
        return f"{self.weight.removesuffix('weight')}bias"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's tensors by their name in the artifact, below the module's path."""
        r, d_in, d_out = self.r, self.in_features, self.out_features
        if self.kind in ("linear", "conv", "projection"):
            A, B = (r, d_in // self.groups, *self.kernel), (d_out, r // self.groups, *(1 for _ in self.kernel))
            shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": A, "lora_B.weight": B, "lora_beta": (1,)}
            if self.source != "lora":
                of_A, of_B = coefficient_shapes(self.source, r, math.prod(A[1:]), d_out, self.bases)
                shapes = {f"lora_A.{of_A[0]}": of_A[1], f"lora_B.{of_B[0]}": of_B[1], "lora_beta": (1,)}
            magnitude = {"outputs": (d_out,), "inputs": (self.groups, *A[1:])}
            shapes.update({"lora_magnitude": magnitude[self.dora]} if self.dora else {})
            shapes.update({"lora_B.bias": (d_out,)} if self.bias else {})
            shapes.update({"lora_norm_weight": (d_out,), "lora_norm_bias": (d_out,)} if self.layer_norm else {})
            return shapes
        if self.kind == "embedding":
            shapes = {"lora_embedding_A": (r, d_in), "lora_embedding_B": (d_out, r), "lora_beta": (1,)}
            magnitude = {"outputs": (d_out,), "inputs": (1, d_in)}
            return shapes | ({"lora_magnitude": magnitude[self.dora]} if self.dora else {})
        return {"lora_rows": (r, d_out)} if self.kind == "rows" else {}

    @property
    def numel(self) -> int:
        """Parameters in A, B and beta."""
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True, eq=False)
class Plan(Reported):
    """Roles of all tensors, the adapters, and what they cost.

    `print(plan)` shows it as a table, and so does a notebook; `plan.to_dict()` is all of it as data.

    Attributes:
        survey: the model that was planned for.
        tensors: one entry per distinct tensor of the base model.
        adapters: one entry per adapted module.
        seed: the scaffold's.
        targets: paths of the modules that carry an adapter, the token embedding apart.
        rule: why these, for people to read.
        left_out: what the rule would have taken, and why it has not.
        options: the config's decisive ones, when it was planned.
        save_dtype: the config's, of which `artifact_bytes` depends.
        bases: a part of what A and B are made of, None where they are trained: it stands for all.
        digests: filled by `scaffold_digests`.
        kept_digests: of runs of each tensor that is neither drawn nor saved, by canonical name.
        kept_bytes: of every byte of theirs, summed up; filled when an artifact is first written.
    """

    survey: Survey
    tensors: tuple[PlannedTensor, ...]
    adapters: tuple[PlannedAdapter, ...]
    seed: int
    targets: tuple[str, ...] = ()
    rule: str = ""
    left_out: tuple[LeftOut, ...] = ()
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    save_dtype: SaveDtype | None = None
    bases: ScaffoldTensor | None = None
    digests: dict[str, str] = field(default_factory=dict, repr=False)
    kept_digests: dict[str, str] = field(default_factory=dict, repr=False)
    kept_bytes: dict[str, str] = field(default_factory=dict, repr=False)

    def with_role(self, role: Role) -> Iterator[PlannedTensor]:
        """The tensors that have this role."""
        return (tensor for tensor in self.tensors if tensor.role == role)

    @property
    def scaffold(self) -> dict[str, ScaffoldTensor]:
        """The drawn, frozen tensors by path."""
        return {t.path: t.base for t in self.with_role("scaffold") if isinstance(t.base, ScaffoldTensor)}

    @property
    def saved(self) -> dict[str, PlannedTensor]:
        """The tensors of the base model that the artifact contains, by path."""
        return {tensor.path: tensor for tensor in self.tensors if tensor.saved}

    @property
    def padding_rows(self) -> dict[str, int]:
        """The row of each table that is zero when drawn, by canonical name."""
        return {t.name: t.survey.zero_row for t in self.tensors if t.survey.zero_row is not None}

    def trains_as(self, other: Plan) -> bool:
        """Whether the two have adapters and trained tensors of the same places and sizes."""
        mine, its = ({tensor.path for tensor in plan.with_role("trained")} for plan in (self, other))
        return self.adapters == other.adapters and mine == its

    @property
    def adapter_parameters(self) -> int:
        """Trainable parameters in A, B and beta ("internal" in the paper's tables)."""
        fixed = sum("lora_beta" in adapter.shapes and not adapter.train_beta for adapter in self.adapters)
        return sum(adapter.numel for adapter in self.adapters if not adapter.rows) - fixed

    @property
    def trainable_parameters(self) -> int:
        """All trainable parameters: adapters, trained tensors and trained rows."""
        rows = sum(adapter.numel for adapter in self.adapters if adapter.rows)
        return self.adapter_parameters + rows + sum(tensor.survey.numel for tensor in self.with_role("trained"))

    @property
    def total_parameters(self) -> int:
        """Parameters of the base model and the adapters."""
        base = sum(tensor.survey.numel for tensor in self.tensors if tensor.survey.kind != "buffer")
        return base + sum(adapter.numel for adapter in self.adapters)

    def scaffold_digests(self) -> dict[str, str]:
        """Digest of each scaffold tensor by canonical name, and of the bases of adapters, if there are any."""
        for spec in (*self.scaffold.values(), *([self.bases] if self.bases else ())):
            if spec.name not in self.digests:
                self.digests[spec.name] = spec.digest()
        return self.digests

    def recorded_digests(self) -> dict[str, dict[str, str]]:
        """What adapter_config.json records of the tensors that the artifact does not contain."""
        return {"scaffold_digests": self.scaffold_digests(), "kept_digests": self.kept_digests}

    def recorded_options(self) -> dict[str, Any]:
        """What it records of the choices that were made."""
        return {"resolved_targets": list(self.targets), "padding_rows": self.padding_rows}

    def saved_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every key of the adapter file but the manifest, with its shape."""
        shapes = {
            saved_key(f"{adapter.path}.{name}"): shape
            for adapter in self.adapters
            for name, shape in adapter.shapes.items()
        }
        shapes.update({saved_key(path): tensor.survey.shape for path, tensor in self.saved.items()})
        return shapes

    def shrinkable(self) -> dict[str, Shrinkable]:
        """The tensors of the adapter file that may be stored in fewer bytes, by key: all but kept ones."""
        found = {
            saved_key(f"{adapter.path}.{name}"): of_adapter(name, shape)
            for adapter in self.adapters
            for name, shape in adapter.shapes.items()
        }
        return found | {saved_key(tensor.path): of_trained(tensor.survey) for tensor in self.with_role("trained")}

    def drawn_tables(self) -> dict[str, ScaffoldTensor]:
        """How trained embeddings start that are drawn, by key: rows that are so still need not be stored."""
        return {
            saved_key(tensor.path): tensor.start
            for tensor in self.with_role("trained")
            if tensor.survey.kind == "embedding" and isinstance(tensor.start, ScaffoldTensor) and tensor.start.exact
        }

    @property
    def stacked(self) -> dict[str, list[str]]:
        """What lies in a file as one tensor `(layers, ...)`, by its key there: the keys of its parts, in order.

        Of adapters whose tensors are so small that their entries in the header would be a large part of the file.
        """
        parts: dict[str, list[str]] = {}
        for adapter in self.adapters:
            for name in adapter.shapes if adapter.source != "lora" else ():
                if name in STACKED:
                    parts.setdefault(f"{STACKED_KEY}.{name}", []).append(saved_key(f"{adapter.path}.{name}"))
        return {key: sorted(keys) for key, keys in parts.items()}

    def trained_rows(self) -> dict[str, list[int]]:
        """The ids of the rows that are trained, by the path of their embedding."""
        return {adapter.path: list(adapter.rows) for adapter in self.adapters if adapter.kind == "rows"}

    def manifest(
        self,
        options: Mapping[str, Any],
        dtype: torch.dtype | None,
        tensors: Mapping[str, str] | None,
        stored: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Everything that makes the model, and one digest for all of it, as a uint8 tensor of JSON, shape `(n,)`.

        Args:
            options: the config's decisive ones.
            dtype: the model's.
            tensors: digests of what the artifact contains, None where the manifest goes with tensors in memory.
            stored: how the file holds them, see `storage.described`; None where all are as they are.
        """
        digests, architecture = self.scaffold_digests(), self.survey.architecture
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "generator": GENERATOR,
            "seed": self.seed,
            "digest": combined_digest(self.seed, digests),
            "scaffold": digests,
            "kept": self.kept_digests,
            "scaling": {adapter.path: adapter.scaling for adapter in self.adapters},
            "residual": any(adapter.residual for adapter in self.adapters),
            "trained": self.trained_paths(),
            "class": self.survey.class_name,
            "architecture": None if architecture is None else {**describe(architecture), "dtype": name_of(dtype)},
            "options": options,
            "tensors": tensors,
        }
        if tensors and self.kept_bytes:
            content["kept_bytes"] = self.kept_bytes
        if self.trained_rows():
            content["rows"] = self.trained_rows()
        if stored is not None:
            content["stored"] = stored
        content["artifact"] = digest_of(content)
        return torch.frombuffer(bytearray(canonical_json(content)), dtype=torch.uint8)

    def trained_paths(self) -> list[str]:
        """The base model's tensors that are trained, and the betas."""
        betas = (f"{adapter.path}.lora_beta" for adapter in self.adapters if "lora_beta" in adapter.shapes)
        fixed = {f"{adapter.path}.lora_beta" for adapter in self.adapters if not adapter.train_beta}
        return sorted({*(tensor.path for tensor in self.with_role("trained")), *betas} - fixed)

    def adapter_dtype(self) -> torch.dtype:
        """PEFT holds adapters over a half-precision model in float32 (`autocast_adapter_dtype`)."""
        dtype = next((t.survey.dtype for t in self.tensors if t.survey.dtype.is_floating_point), torch.float32)
        return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype

    def artifact_bytes(self, adapter_dtype: torch.dtype | None = None) -> int:
        """Size of `adapter_model.safetensors`, to within a few bytes: saved tensors, manifest, header.

        In `save_dtype`, and with all rows of trained embeddings: which ones training changes is not known before it.
        """
        dtypes = {saved_key(path): tensor.survey.dtype for path, tensor in self.saved.items()}
        dtypes = {key: dtypes.get(key, adapter_dtype or self.adapter_dtype()) for key in self.saved_shapes()}
        shrinkable = self.shrinkable()
        forms = {key: tensor.form(dtypes[key], self.save_dtype) for key, tensor in shrinkable.items()}
        dtypes |= {key: FORMS[form] for key, form in forms.items() if form}
        entries = {key: (dtypes[key], shape) for key, shape in self.saved_shapes().items()}
        for key, parts in self.stacked.items():
            each = [entries.pop(part) for part in parts]
            entries[key] = (each[0][0], (len(parts), *each[0][1]))
        scales = sum(math.prod(shrinkable[key].scales or ()) for key, form in forms.items() if form == "int8")
        if scales:
            entries[SCALES_KEY] = (torch.bfloat16, (scales,))
        options = {**self.options, **self.recorded_options(), "other_dtypes": {}}
        digests = {"digest": "0" * 64, "each": "0" * 8 * len(entries)}
        loss = {shrinkable[key].group: (0.00123, 0.00123) for key, form in forms.items() if form}
        stored = described(self.save_dtype, forms, {}, loss, self.stacked)
        manifest = self.manifest(options, torch.float32, digests, stored)
        return file_bytes({**entries, MANIFEST_KEY: (torch.uint8, tuple(manifest.shape))})
