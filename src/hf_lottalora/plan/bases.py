"""Base models whose tensors have other names, or are elsewhere, than the architecture says."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..paths import clean_modules
from ..residency.partitions import is_partitioned
from ..residency.shards import is_sharded

# Names of the child that torch.compile, FSDP, activation checkpointing and Lightning Fabric put what they wrap under.
_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)


def check_unwrapped(model: nn.Module) -> None:
    """Refuse a model, or a module in it, that is wrapped: its tensors' names are not those of the architecture.

    Raises:
        ValueError: the wrapper and its place are named.
    """
    for path, module in clean_modules(model):
        where = f"{path!r}" if path else "The model"
        inside = next((name for name in _INSIDE if name in module._modules), None)
        inside = "module" if isinstance(module, _WRAPPERS) else inside
        if inside is not None:
            raise ValueError(
                f"{where} is wrapped in a {type(module).__name__}, which puts {inside!r} into its tensors' names, and "
                "a seed draws by name. Pass what is inside, and wrap the model that get_peft_model returns. To "
                "compile, module.compile() changes no name."
            )
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):  # torch may be built without it
            raise ValueError(
                f"{where} is sharded by fully_shard, so that there are no whole tensors to draw into. Pass the model "
                "before it is sharded."
            )
        if any(is_sharded(parameter) for parameter in module._parameters.values() if parameter is not None):
            raise ValueError(
                f"{where} is sharded over processes, as by tensor parallelism, which is not supported over a scaffold: "
                "what it does to inputs and outputs it does around a layer's own forward, which an adapter computes "
                "anew. Load the model without tp_plan and tp_size, and train with DDP, FSDP2 or DeepSpeed."
            )
        if any(is_partitioned(parameter) for parameter in module._parameters.values()):
            raise ValueError(
                f"{where} is partitioned by DeepSpeed's ZeRO-3, so that it has no shapes to plan for. get_peft_model "
                "knows how to plan it; for a plan alone build the model before TrainingArguments or Accelerator."
            )
