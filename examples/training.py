"""From arguments to a model, and from a model to its results: what every training script here shares."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from accelerate import init_empty_weights
from arguments import LottaLoraArguments, ModelArguments, UsageError
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import hf_lottalora

logger = logging.getLogger(__name__)


def evaluates(training_args: TrainingArguments) -> bool:
    """Whether there will be an evaluation, during training or after it."""
    return training_args.do_eval or training_args.eval_strategy != "no"


def _hub(args: ModelArguments) -> dict[str, str | None]:
    return {"cache_dir": args.cache_dir, "revision": args.model_revision}


# ---- model and tokenizer ------------------------------------------------------------------------------------------


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """That of --tokenizer_name, or of the model or architecture."""
    name = args.tokenizer_name or args.model_name_or_path or args.config_name
    if name is None:
        raise UsageError("--model_type has no tokenizer. Pass --tokenizer_name.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **_hub(args))
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} has no tokenizer that can be loaded: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UsageError(f"{name} has no tokenizer with a vocabulary. Pass --tokenizer_name.")
    return tokenizer


def load_config(args: ModelArguments, **changes: Any) -> PreTrainedConfig:
    """The architecture, with these changes and those of --config_overrides."""
    if args.model_type:
        config = AutoConfig.for_model(args.model_type, **changes)
    else:
        name = args.config_name or args.model_name_or_path
        try:
            config = AutoConfig.from_pretrained(name, **changes, **_hub(args))
        except (OSError, ValueError) as error:
            raise UsageError(f"{name} has no config.json that can be loaded: {error}") from error
    if args.config_overrides:
        try:
            config.update_from_string(args.config_overrides)
        except ValueError as error:
            raise UsageError(f"--config_overrides {args.config_overrides}: {error}.") from error
    return config


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UsageError` if the tokenizer has tokens that the model has no row for."""
    size = config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise UsageError(
            f"The tokenizer has {len(tokenizer)} tokens, the model {size}: they do not belong together. "
            "Pass another --tokenizer_name, or --config_overrides vocab_size=..."
        )


def load_artifact(kind: type, args: ModelArguments, lottalora: LottaLoraArguments) -> nn.Module:
    """A trained model, whole. `kind` is the AutoModel of the task."""
    auto = getattr(hf_lottalora, kind.__name__.replace("Auto", "AutoLottaLora"))
    options = {"residency": lottalora.residency} if lottalora.residency else {}
    return auto.from_pretrained(args.model_name_or_path, **options)


def load_model(kind: type, config: PreTrainedConfig, args: ModelArguments, lottalora: LottaLoraArguments) -> nn.Module:
    """The base model: pretrained, or of an architecture. `kind` is the AutoModel of the task."""
    dtype = {"dtype": args.dtype} if args.dtype else {}
    if args.model_name_or_path:
        return kind.from_pretrained(args.model_name_or_path, config=config, **dtype, **_hub(args))
    drawn = lottalora.method == "lottalora" and lottalora.redraw == "all"
    with init_empty_weights(include_buffers=False) if drawn else nullcontext():  # every weight comes from the seed
        model = kind.from_config(config, **dtype)
    model.tie_weights()
    return model


def input_length(
    wanted: int | None, model: nn.Module, tokenizer: PreTrainedTokenizerBase, default: int | None = None
) -> int:
    """As many tokens as wanted, else as the default, or as tokenizer and model take."""
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    length = min(wanted or default, *(limit for limit in limits if limit))
    if wanted and length < wanted:
        logger.warning("Inputs are cut to %d tokens: tokenizer or model take no more.", length)
    return length


def with_method(model: nn.Module, args: LottaLoraArguments, seed: int, task_type: str | None = None) -> nn.Module:
    """Make `model` trainable by `--method`, and log the plan."""
    if args.method == "full":
        return model
    config = args.config(seed, task_type)
    try:
        plan = hf_lottalora.make_plan(model, config)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.method == "lottalora":
        logger.info("%s", plan)
        return get_peft_model(model, config)
    adapted = [adapter.path for adapter in plan.adapters]
    trained = sorted({tensor.path.rpartition(".")[0] for tensor in plan.with_role("trained")})
    lora = LoraConfig(
        task_type=task_type,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=adapted,
        modules_to_save=trained,
    )
    return get_peft_model(model, lora)


def log_sizes(model: nn.Module, training_args: TrainingArguments) -> None:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    logger.info("processes: %d, device: %s", training_args.world_size, training_args.device)
    logger.info("trainable: %s of %s parameters (%.2f %%)", f"{trainable:,}", f"{total:,}", 100 * trainable / total)


# ---- the run ------------------------------------------------------------------------------------------------------


def new_trainer(kind: type[Trainer], model: nn.Module, lottalora: LottaLoraArguments, **parts: Any) -> Trainer:
    """A trainer of this kind. `parts` are its other arguments, `args` among them."""
    training_args = parts["args"]
    log_sizes(model, training_args)
    if training_args.ddp_find_unused_parameters is None:
        training_args.ddp_find_unused_parameters = False  # every trained parameter takes part in every step
    callbacks = [hf_lottalora.RanksAgreeCallback()] if lottalora.method == "lottalora" else None
    return kind(model=model, callbacks=callbacks, **parts)


def train_and_evaluate(trainer: Trainer, evaluation: Mapping[str, Any]) -> None:
    """Train, save and evaluate, as --do_train and --do_eval say, and write the metrics.

    Args:
        trainer: with everything it needs.
        evaluation: the sets to evaluate on by the suffix of their metrics' names, "" for one alone.
    """
    args = trainer.args
    if args.do_train:
        metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
        metrics |= _count("train_samples", trainer.train_dataset)
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if args.do_eval:
        metrics = {}
        for suffix, rows in evaluation.items():
            scores = trainer.evaluate(rows)
            metrics |= {f"{name}{suffix}": value for name, value in scores.items()}
            metrics |= _count(f"eval_samples{suffix}", rows)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


def _count(name: str, rows: Any) -> dict[str, int]:
    return {name: len(rows)} if hasattr(rows, "__len__") else {}  # a stream has no length
