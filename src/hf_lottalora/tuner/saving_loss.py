"""What a smaller artifact would lose, before it is written."""

from __future__ import annotations

from typing import Any

from peft import get_peft_model_state_dict

from ..artifact.stored import Loss, encoded, loss_in
from ..options import SaveDtype, check_types
from ..plan.plan import MANIFEST_KEY
from .model import tuner_of


def saving_loss(model: Any, save_dtype: SaveDtype, adapter_name: str | None = None) -> dict[str, Loss]:
    """How far an adapter's tensors are from what a file would hold of them, without writing one.

    Args:
        model: a `PeftModel` with a LottaLoRA adapter.
        save_dtype: as in `LottaLoraConfig`.
        adapter_name: by default the first active one.

    Returns:
        By group ("A and B", "embeddings", "norms", ...), for those that are stored with fewer digits: `relative`,
        ||x - stored|| / ||x|| over the group, and `largest`, of |x - stored| in any element. What was loaded from an
        artifact of the same `save_dtype`, and not changed since, loses nothing again.

    Raises:
        ValueError: the model has no such adapter, `save_dtype` is none, or a value does not fit it.

    Example:
        >>> import torch
        >>> from hf_lottalora import LottaLoraConfig, saving_loss
        >>> from peft import get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))
        >>> model = get_peft_model(net, LottaLoraConfig(seed=42, r=8, target_modules=["0"], modules_to_save=["1"]))
        >>> {group: loss.relative < 0.01 for group, loss in saving_loss(model, "int8").items()}
        {'A and B': True, 'matrices': True}
    """
    check_types({"save_dtype": save_dtype}, {"save_dtype": SaveDtype})
    tuner = tuner_of(model)
    tensors = get_peft_model_state_dict(model, adapter_name=tuner._known(adapter_name))
    del tensors[MANIFEST_KEY]
    return loss_in(encoded(tuner.get_plan(adapter_name), tensors, save_dtype)[1])
