"""The functions of PEFT that read an adapter's files before anything of ours is asked: with our reader on the way.

For good, and passing on what is not ours.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftModel
from peft.config import PeftConfigMixin

from .artifact.files import HUB_OPTIONS, read_weights
from .artifact.reader import is_ours, read_adapter_config
from .config import LottaLoraConfig
from .plan.plan import MANIFEST_KEY


def watch() -> None:
    """Put our reader there; once."""
    _read_configs()
    _check_weights_first()


def _read_configs() -> None:
    """`adapter_config.json`, which PEFT reads for its `peft_type` first, and leaves out what it does not know."""
    read = PeftConfigMixin.from_json_file.__func__

    @functools.wraps(read)
    def from_json_file(cls: Any, path_json_file: Any, **kwargs: Any) -> Any:
        if issubclass(cls, LottaLoraConfig) or is_ours(path_json_file):
            return read_adapter_config(path_json_file)
        return read(cls, path_json_file, **kwargs)

    PeftConfigMixin.from_json_file = classmethod(from_json_file)  # type: ignore[arg-type]


def _check_weights_first() -> None:
    """`load_adapter`: into an adapter that is there PEFT reads no config, and into plain LoRA whatever has its keys."""
    load = PeftModel.load_adapter

    @functools.wraps(load)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config.get(adapter_name)
        if isinstance(config, LottaLoraConfig):
            hub = {key: kwargs[key] for key in ("subfolder", *HUB_OPTIONS) if kwargs.get(key) is not None}
            read_weights(model_id, **hub)
        result = load(self, model_id, adapter_name, *args, **kwargs)
        if any(MANIFEST_KEY in key for key in result.unexpected_keys):
            raise ValueError(
                f"{model_id} has the weights of a LottaLoRA artifact, but its adapter_config.json says peft_type="
                f"{self.peft_config[adapter_name].peft_type.value!r}, expected 'LOTTALORA'. They were loaded over the "
                "wrong backbone: throw this model away, and get the files again from where they came."
            )
        return result

    PeftModel.load_adapter = load_adapter
