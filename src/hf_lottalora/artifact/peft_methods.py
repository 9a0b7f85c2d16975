"""What PEFT's and Trainer's methods do with files, the hub and cards where the artifact is ours; others pass through.

PEFT reads an adapter's files before anything of ours is asked: here our reader is put on the way.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import PeftModel
from peft.config import PeftConfigMixin
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import Trainer

from ..config import LottaLoraConfig
from ..plan.plan import MANIFEST_KEY
from . import reader
from .card import card_text, hub_base, reported, write_card
from .card_parts import split
from .files import check_any_present, read_weights
from .hub import HUB_OPTIONS, local_copy, reason
from .loaders import pipeline_tag
from .publish import push_folder, push_model


def is_ours(model: Any) -> bool:
    """Whether this is a `PeftModel` with LottaLoRA adapters."""
    return isinstance(model, PeftModel) and any(c.peft_type == "LOTTALORA" for c in model.peft_config.values())


def install() -> None:
    """Put the methods below in the place of theirs, for good."""
    for owner, method in (
        (PeftModel, push_to_hub),
        (PeftModel, create_or_update_model_card),
        (PeftModel, load_adapter),
        (Trainer, __init__),
        (Trainer, create_model_card),
        (PeftConfigMixin, from_json_file),
        (PeftConfigMixin, _get_peft_type),
    ):
        wrap(owner, method)


def wrap(owner: Any, method: Callable[..., Any]) -> None:
    """Put a function in the place of a method of its name; it gets that one as its first argument."""
    theirs = inspect.getattr_static(owner, method.__name__)
    of_class = isinstance(theirs, classmethod)
    function = theirs.__func__ if of_class else theirs

    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(function, self, *args, **kwargs)

    setattr(owner, method.__name__, classmethod(wrapper) if of_class else wrapper)


def push_to_hub(theirs: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Theirs would put a template in the place of our card."""
    return push_model(model, *args, **kwargs) if is_ours(model) else theirs(model, *args, **kwargs)


def create_or_update_model_card(theirs: Callable[..., Any], model: Any, output_dir: str | os.PathLike[str]) -> None:
    """PEFT's has base_model: '', and its tags instead of a user's. Ours describes weights, so it follows them."""
    if not is_ours(model):
        theirs(model, output_dir)
    elif "default" in model.peft_config and Path(output_dir, SAFETENSORS_WEIGHTS_NAME).is_file():
        write_card(model.base_model.plans["default"], Path(output_dir))


def load_adapter(
    theirs: Callable[..., Any], model: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """From the hub: all files from one commit, that of the config which `from_pretrained` may just have read.

    Into an adapter that is there PEFT reads no config, and into plain LoRA whatever has its keys.
    """
    named, config = model_id, model.peft_config.get(adapter_name)
    options = {key: kwargs[key] for key in ("subfolder", *HUB_OPTIONS) if kwargs.get(key) is not None}
    if is_ours(model):
        just_read, commit = getattr(config, "_artifact_commit", None) or (None, None)
        read = {"revision": commit, "force_download": False} if just_read == str(model_id) else {}
        if config is not None:
            config._artifact_commit = None  # it holds for one call only
        folder = local_copy(model_id, **{**options, **read})
        if folder is not None:
            model_id = str(folder)
            kwargs = {key: value for key, value in kwargs.items() if key not in options}
            options = {}
    if isinstance(config, LottaLoraConfig):
        read_weights(model_id, **options)
    try:
        result = theirs(model, model_id, adapter_name, *args, **kwargs)
    except BaseException:
        if is_ours(model) and config is None and adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)  # PEFT adds it before it reads the weights
        raise
    if any(MANIFEST_KEY in key for key in result.unexpected_keys):
        raise ValueError(
            f"{named} has the weights of a LottaLoRA artifact, but its adapter_config.json says peft_type="
            f"{model.peft_config[adapter_name].peft_type.value!r}, expected 'LOTTALORA'. They were loaded over the "
            "wrong backbone: throw this model away, and get the files again from where they came."
        )
    return result


def __init__(theirs: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
    """A subclass may write cards of its own, as TRL's do: they go the same way."""
    theirs(trainer, *args, **kwargs)
    own = type(trainer).create_model_card
    if own is not Trainer.create_model_card:
        trainer.create_model_card = functools.wraps(own)(functools.partial(create_model_card, own, trainer))


def create_model_card(theirs: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> None:
    """Trainer writes its own over everything: that is taken into ours, beside a user's words and metadata."""
    top = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not is_ours(model) or not trainer.is_world_process_zero():
        theirs(trainer, *args, **kwargs)
        return
    name = "default" if "default" in model.peft_config else model.active_adapter
    subfolder = None if name == "default" else name
    file = top / "README.md"
    card = split(file.read_text(encoding="utf-8-sig") if file.is_file() else None)
    plan = model.base_model.plans[name]
    known = {
        "tasks": pipeline_tag(plan.survey.architecture, plan.survey.class_name),
        "finetuned_from": hub_base(plan) or "",
    }
    taken = inspect.signature(theirs)
    given = taken.bind(trainer, *args, **kwargs)
    for key in known.keys() & taken.parameters:  # Trainer finds neither in a PeftModel
        if given.arguments.get(key) is None:
            given.arguments[key] = known[key]
    theirs(*given.args, **given.kwargs)
    card.add_trainers(split(file.read_text(encoding="utf-8-sig")))
    revision = getattr(trainer.args, "hub_revision", None) if trainer.hub_model_id else None
    place = {"path": trainer.hub_model_id, "revision": None if revision == "main" else revision, "subfolder": subfolder}
    weights = (top / (subfolder or "") / SAFETENSORS_WEIGHTS_NAME).is_file()  # else our part comes with them
    if weights:
        text = card_text(plan, top / (subfolder or ""), card, **place)
    else:
        card.data.library_name, card.trainer = "peft", reported(plan, card.trainer)
        text = card.text(card.data, "")
    file.write_text(text, encoding="utf-8")


def save_and_push(save: Callable[..., None], model: Any, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """`save_pretrained(push_to_hub=True, repo_id=...)` as in transformers: without `repo_id` the folder's name says it.

    The names of what `push_folder` takes, the adapters apart, are taken for it; the others are `save_pretrained`'s.
    """
    names = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    repo_id = kwargs.pop("repo_id", None) or Path(save_directory).absolute().name
    validate_repo_id(repo_id)  # before anything is written
    save(model, save_directory, **kwargs)
    if kwargs.get("is_main_process", True):
        push_folder(model, save_directory, repo_id, adapters=kwargs.get("selected_adapters"), **options)


def from_json_file(theirs: Callable[..., Any], cls: Any, path_json_file: Any, **kwargs: Any) -> Any:
    """`adapter_config.json`, which PEFT reads for its `peft_type` first, and leaves out what it does not know."""
    too_large = os.path.getsize(path_json_file) > reader.MAX_BYTES  # is refused, whoever wrote it
    if too_large or issubclass(cls, LottaLoraConfig) or reader.is_ours(path_json_file):
        return reader.read_adapter_config(path_json_file)
    return theirs(cls, path_json_file, **kwargs)


def _get_peft_type(theirs: Callable[..., Any], cls: Any, model_id: Any, **hub: Any) -> Any:
    """As PEFT's, for every method, with the reason in its error."""
    check_any_present(model_id, hub.get("subfolder"))
    try:
        return theirs(cls, model_id, **hub)
    except ValueError as error:
        if error.__context__ is None or Path(model_id).is_dir():
            raise
        why = reason(error.__context__, str(model_id), CONFIG_NAME, hub.get("revision"))
        raise ValueError(f"{error}. {why}") from error.__context__
