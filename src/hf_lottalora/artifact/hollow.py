"""Build a model without values, in one thread: parameters on the meta device, buffers real, nothing initialised.

accelerate's `init_empty_weights` and transformers' `no_init_weights` exchange functions of torch, for every thread of
the process, and two of them that overlap leave theirs behind. Torch's own registration hooks can ask which thread
it is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from ..plan.initialization import PrivateRandomness

# While transformers builds, it sets torch's default dtype, and ties of `PreTrainedModel` aside: one model at a time.
BUILDING = threading.RLock()

_thread = threading.local()


@contextmanager
def hollow(most: int | None = None) -> Iterator[None]:
    """Modules that this thread makes here have no values but those of buffers. Others' are as ever.

    Args:
        most: how many parameters may be made, by default any number.

    Raises:
        ValueError: there are more.
    """
    with BUILDING, PrivateRandomness():  # some constructors draw
        _thread.hollow, _thread.left = True, most
        try:
            yield
        finally:
            _thread.hollow = False


def _registered(module: nn.Module, name: str, value: Any) -> Any:
    if not getattr(_thread, "hollow", False):
        return None
    module._is_hf_initialized = True  # type: ignore[assignment]  # transformers leaves such a module alone
    if not isinstance(value, nn.Parameter) or value.is_meta:
        return None
    if _thread.left is not None:
        _thread.left -= 1
        if _thread.left < 0:
            raise ValueError("the model has far more tensors than the artifact")
    return nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)


# Once and for good: while another thread registers a parameter, no hook may come or go.
torch_module.register_module_parameter_registration_hook(_registered)
torch_module.register_module_buffer_registration_hook(_registered)
torch_module.register_module_module_registration_hook(_registered)
