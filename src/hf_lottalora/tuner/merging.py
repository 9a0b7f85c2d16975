"""The part of `LottaLoraModel` that says where weights live, and merges into them, for which they must be in memory."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers.walk import scaffold_layers
from ..plan.plan import Plan
from ..residency.forms import Residency, check_residency
from .base_model import BaseTensors
from .trained import TrainedTensors


class Merging:
    """`set_residency`, and merging over PEFT's."""

    model: nn.Module
    base: BaseTensors
    trained: TrainedTensors
    first_plan: Plan
    active_adapters: list[str]
    peft_config: dict[str, Any]
    _unfused: list[tuple[nn.Module, str, Any]]
    _switched: int
    _off: int

    residency: Residency = "dense"

    def set_residency(self, residency: Residency) -> None:
        """Hold the frozen scaffold in memory, packed or not at all; what the model computes stays the same.

        Args:
            residency: "dense" (values in the model's dtype), "packed" (k random bits per weight), "int4" (binary and
                ternary scaffolds on a CPU: 4 bits per weight for torch's int4 kernel, which decodes fastest; matrices
                whose shape it does not take are packed), or "streamed" (nothing; each weight is drawn when it is used,
                forward and again backward).

        Raises:
            ValueError: it is none of these, the family is not for it, or adapters are merged, which needs "dense".

        Example:
            >>> import torch
            >>> from peft import get_peft_model
            >>> from hf_lottalora import LottaLoraConfig
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
            >>> model = get_peft_model(net, LottaLoraConfig(seed=42, r=1, target_modules=["0"], modules_to_save=["1"]))
            >>> model.set_residency("streamed")
            >>> model.residency
            'streamed'
        """
        if self._off:
            raise ValueError("The scaffold is switched off. Leave scaffold_off before set_residency.")
        residency = check_residency(residency, {spec.family for spec in self.first_plan.scaffold.values()})
        if residency != "dense" and self._merged():
            raise ValueError("Adapters are merged into the scaffold. Call unmerge_adapter() first.")
        self.base.set_residency(self.first_plan, residency)
        self.residency = residency
        for config in self.peft_config.values():
            config.residency = residency  # as it will be saved

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's. A scaffold that is packed or streamed is dense until `unmerge_adapter`.

        Raises:
            ValueError: within `scaffold_seed` or `scaffold_off`, whose end draws the scaffold again; or a scaffold that
                is packed or streamed was cast to a smaller dtype and back, and could not be that again.
        """
        self._check_unswitched()
        if self.residency != "dense" and not self._merged():
            self.base.verify_unsaved(self.first_plan)
        self.base.set_residency(self.first_plan, "dense")
        try:
            super().merge_adapter(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._restore_residency()

    def unmerge_adapter(self) -> None:
        """As PEFT's."""
        super().unmerge_adapter()  # type: ignore[misc]
        self._restore_residency()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        self._check_unswitched()
        self.base.set_residency(self.first_plan, "dense")
        owner = self.trained.owner_among(adapter_names or self.active_adapters) if merge else None
        self.trained.install(self.model, owner)
        try:
            unloaded = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)  # type: ignore[misc]
        except BaseException:
            self._restore_residency()
            raise
        for module, attribute, value in self._unfused:
            setattr(module, attribute, value)
        model: nn.Module = unloaded
        return model

    def _merged(self) -> bool:
        return any(layer.merged for layer in scaffold_layers(self.model))

    def _restore_residency(self) -> None:
        if self.residency != "dense" and not self._merged():
            self.base.set_residency(self.first_plan, self.residency)

    def _check_unswitched(self) -> None:
        if self._switched:
            raise ValueError(
                "Adapters cannot be merged or unloaded within scaffold_seed or scaffold_off, which draw the scaffold "
                "again at their end. Use set_scaffold_seed for good, or merge outside."
            )
