"""Mixed batches, `model(**inputs, adapter_names=[...])`, where adapters have trained tensors of their own.

PEFT's layers pick an adapter for each row. A module that reads trained tensors (a norm, a head, an embedding) is called
once for each adapter here, on its rows and with its tensors, if it is known to take and give the rows of the batch
first; where it does not, the smallest module around it that does. What has none is refused before the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from peft.tuners.lora.model import _get_encoder
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..layers.embedding import TiedHead
from ..layers.layer import ScaffoldLayer
from ..layers.mixed import RowAdapters
from ..layers.walk import outside_adapters
from ..paths import owner_of
from ..plan.plan import PlannedTensor
from .row_probe import FoundRows, check_rows, find_rows, structure
from .trained import TrainedTensors

_ONE_BY_ONE = "Run the adapters one after the other with set_adapter."


class Mixing:
    """The mixed batches of one model.

    Attributes:
        found: where the rows are, for each kind of inputs that there was; to be emptied when modules change.
    """

    def __init__(self, model: nn.Module, trained: TrainedTensors) -> None:
        self.model, self.trained = model, trained
        self.found: dict[Any, FoundRows] = {}

    @contextmanager
    def batch(self, names: list[str], num_beams: int = 1) -> Iterator[None]:
        """Within it the model computes row i, of those that `num_beams` make of each, with the adapter `names[i]`.

        Raises:
            ValueError: by the forward within, before it runs: there are not as many names as rows, or a tensor or layer
                of one of the adapters is not in a module that has the rows first. The model is as it was.
        """
        batch = _Batch(self.model, self.trained, self.found, names, num_beams)
        with ExitStack() as stack:
            stack.enter_context(batch.layers_named())
            encoder = _get_encoder(self.model)
            entrances = {self.model: len(names) * num_beams, **({} if encoder is None else {encoder: len(names)})}
            enter = batch.entrance
            if batch.alone is not None:
                stack.enter_context(batch.standing(batch.alone, batch.tensors))
                enter = _counting
            stack.enter_context(_forwards({module: enter(module, rows) for module, rows in entrances.items()}))
            yield


class _Batch:
    """One call of the model.

    Attributes:
        alone: the adapter whose rows alone are computed now.
        tensors: all that adapters of this batch train, or one that is installed.
    """

    def __init__(
        self, model: nn.Module, trained: TrainedTensors, found: dict[Any, FoundRows], names: list[str], num_beams: int
    ) -> None:
        self.model, self.trained, self.found = model, trained, found
        repeated = [name for name in names for _ in range(num_beams)]
        self.rows = {len(each): RowAdapters(each) for each in (names, repeated)}
        self.names = list(dict.fromkeys(names))
        self.alone = self.names[0] if len(self.names) == 1 else None
        self.paths = {module: path for path, module in outside_adapters(model)}
        self.now: FoundRows | None = None
        self.tensors: dict[str, PlannedTensor] = {}
        for name in (*self.names, trained.installed or ""):
            self.tensors.update(trained.planned.get(name, {}))
        self._seen: dict[Any, tuple[FoundRows, dict[str, frozenset[str]]]] = {}
        self._copies = {name: trained.parameters_of(model, name) for name in self.names}
        self._base_values: dict[str, torch.Tensor] = {}
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {}
        for path, tensor in self.tensors.items():
            owners = [owner_of(model, alias) for alias in tensor.survey.aliases]
            self._places[path] = [(owner._parameters, attribute) for owner, attribute in owners]
            if any(has_offloaded_params(owner) for owner, _ in owners):
                raise ValueError(
                    f"adapter_names cannot mix rows where {path!r} is offloaded by Accelerate. {_ONE_BY_ONE}"
                )

    # ---- layers ---------------------------------------------------------------------------------------------------

    @contextmanager
    def layers_named(self) -> Iterator[None]:
        """PEFT gives its layers the names of all rows; within a part of the batch they are those of that part."""
        handles = [
            module.register_forward_pre_hook(partial(self._name_rows, path), with_kwargs=True)
            for module, path in self.paths.items()
            if isinstance(module, (ScaffoldLayer, TiedHead))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _name_rows(self, path: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        size = len(args[0] if args else kwargs["x"])
        if self.alone is not None:
            return args, {**kwargs, "adapter_names": RowAdapters([self.alone] * size)}
        if self.now is None or path not in self.now.rows_first:
            raise ValueError(_unforeseen(path))
        return args, {**kwargs, "adapter_names": self._of(size, path)}

    def _of(self, size: int, path: str) -> RowAdapters:
        if size not in self.rows:
            raise ValueError(
                f"adapter_names has {' or '.join(map(str, self.rows))} rows, and {path!r} was called with {size}."
            )
        return self.rows[size]

    # ---- trained tensors ------------------------------------------------------------------------------------------

    @contextmanager
    def standing(self, name: str, paths: Iterable[str]) -> Iterator[None]:
        """Within it all rows are this adapter's, and its tensors, or the base values, stand at these paths."""
        coming = [(*place, self._value(name, path)) for path in paths for place in self._places[path]]
        before = [(parameters, key, parameters[key]) for parameters, key, _ in coming]
        outer, self.alone = self.alone, name
        try:
            for parameters, key, value in coming:
                parameters[key] = value
            yield
        finally:
            for parameters, key, value in before:
                parameters[key] = value
            self.alone = outer

    def _value(self, name: str, path: str) -> torch.Tensor:
        if path in self._copies.get(name, {}):
            return self._copies[name][path]
        if path not in self._base_values:  # drawn again, perhaps: once for the whole call
            self._base_values[path] = self.trained.base_value(self.model, path)
        return self._base_values[path]

    # ---- the model ------------------------------------------------------------------------------------------------

    def entrance(self, module: nn.Module, rows: int) -> Callable[..., Any]:
        """The forward of the model, or of an encoder that `generate` calls by itself."""
        original = module.forward

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.now is not None or self.alone is not None:  # the model calls its encoder, or is being looked at
                return original(*args, **kwargs)
            found, units = self._looked_at(module, original, (args, kwargs), rows)
            self.now = found
            try:
                with _forwards({**self._guards(found), **self._splitting(found, units)}):
                    return original(*args, **kwargs)
            finally:
                self.now = None

        return forward

    def _looked_at(
        self, module: nn.Module, forward: Callable[..., Any], inputs: Any, rows: int
    ) -> tuple[FoundRows, dict[str, frozenset[str]]]:
        """Where the rows are, and the modules to call once for each adapter; after it nothing is refused any more."""
        key = self.paths[module], structure(inputs), frozenset(self.tensors)
        if key not in self.found:
            watched = {path: getattr(*owner_of(self.model, path)) for path in self.tensors}
            self.alone = self.names[0]  # whichever: the layers of all have the same places
            try:
                self.found[key] = find_rows(module, forward, inputs, rows, watched, self.paths[module])
            finally:
                self.alone = None
        if key not in self._seen:
            found = self.found[key]
            units = self._units(found)
            self._check_layers(found, units)
            for name in self.names:
                for path in found.reads:
                    self._value(name, path)  # which may have to be drawn, or not be there
            self._seen[key] = found, units
        return self._seen[key]

    def _units(self, found: FoundRows) -> dict[str, frozenset[str]]:
        """The modules to call once for each adapter, with the tensors that are read in them.

        Raises:
            ValueError: a tensor is read where no module around has the rows first.
        """
        units = set()
        for path, reads in found.reads.items():
            for running in reads:
                unit = next((module for module in reversed(running) if module in found.rows_first), None)
                if unit is None:
                    trains = sorted(name for name, planned in self.trained.planned.items() if path in planned)
                    reader = running[-1] if running else type(self.model).__name__
                    raise ValueError(
                        f"adapter_names cannot mix rows here: {path!r}, which adapters {trains} train, is read by "
                        f"{reader!r}, and no module around it takes and gives tensors with the batch first, "
                        f"and nothing else that has a state. {_ONE_BY_ONE} Or train adapters that leave it frozen."
                    )
                units.add(unit)
        return {unit: found.inside(unit) for unit in units}

    def _check_layers(self, found: FoundRows, units: Iterable[str]) -> None:
        for module, path in self.paths.items():
            layer = module.embedding if isinstance(module, TiedHead) else module
            if path not in found.called - found.rows_first.keys() or not isinstance(layer, ScaffoldLayer):
                continue
            if any(map(layer._has, self.names)) and not any(path.startswith(f"{unit}.") for unit in units):
                raise ValueError(
                    f"adapter_names cannot mix rows here: {path!r} has an adapter, and is not called with the rows of "
                    f"the batch first. {_ONE_BY_ONE}"
                )

    def _splitting(self, found: FoundRows, units: dict[str, frozenset[str]]) -> dict[nn.Module, Callable[..., Any]]:
        split: dict[nn.Module, Callable[..., Any]] = {}
        for path, tensors in units.items():
            module = self.model.get_submodule(path)
            split[module] = wraps(module.forward)(
                partial(self._by_adapter, path, module.forward, found.rows_first[path], tensors)
            )
        return split

    def _by_adapter(
        self,
        path: str,
        forward: Callable[..., torch.Tensor],
        flags: tuple[bool, ...],
        tensors: Iterable[str],
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.alone is not None:  # within a larger part, whose tensors stand
            return forward(*args, **kwargs)
        named = kwargs.pop("adapter_names", None) is not None
        leaves, layout = tree_flatten((args, kwargs))
        batch = [leaf for leaf, flag in zip(leaves, flags, strict=False) if flag and isinstance(leaf, torch.Tensor)]
        if len(leaves) != len(flags) or len(batch) != sum(flags) or len({len(tensor) for tensor in batch}) != 1:
            raise ValueError(_unforeseen(path))

        def part(name: str, rows: torch.Tensor) -> torch.Tensor:
            mine = [leaf[rows.to(leaf.device)] if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
            own_args, own = tree_unflatten(mine, layout)
            if named:
                own["adapter_names"] = RowAdapters([name] * len(rows))
            with self.standing(name, tensors):
                return forward(*own_args, **own)

        return self._of(len(batch[0]), path).apart(part, batch[0].device)

    def _guards(self, found: FoundRows) -> dict[nn.Module, Callable[..., Any]]:
        """Modules with a trained tensor that were not seen running, such as experts that no row was sent to."""
        guards: dict[nn.Module, Callable[..., Any]] = {}
        for path in self.tensors.keys() - found.reads.keys():
            for alias in self.tensors[path].survey.aliases:
                owner, _ = owner_of(self.model, alias)
                at = self.paths[owner]
                if at not in found.called and not at.endswith(".base_layer"):  # a layer looks itself
                    guards[owner] = partial(_refuse, at)
        return guards


def _counting(module: nn.Module, rows: int) -> Callable[..., Any]:
    original = module.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        check_rows((args, kwargs), rows)
        return original(*args, **kwargs)

    return forward


def _unforeseen(path: str) -> str:
    return (
        f"adapter_names cannot mix rows here: {path!r} was called otherwise than when the model was run on the first "
        f"rows to see where rows are. {_ONE_BY_ONE}"
    )


def _refuse(path: str, *_: Any, **__: Any) -> None:
    raise ValueError(_unforeseen(path))


@contextmanager
def _forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within it these modules have another forward, as Accelerate gives them one: in the module, not its class."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module, own in before.items():
            if own is not None:
                module.forward = own
            else:
                vars(module).pop("forward", None)
