"""Arguments that every training script here takes, and what is said of those that cannot work."""

from __future__ import annotations

import hf_lottalora  # isort: skip  # first: it registers the method with PEFT
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import transformers
from transformers import CONFIG_MAPPING, HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


class UsageError(ValueError):
    """Something in the arguments or the data that the user can put right. Nothing has been trained or written."""


@dataclass
class ModelArguments:
    """The network: pretrained, or only an architecture."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Pretrained model, from the hub or a folder. Or a saved LottaLoRA artifact, to evaluate it."},
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Architecture alone, from the hub or a folder with config.json: no weights are downloaded. Pass "
            "--tokenizer_name too where it has no tokenizer."
        },
    )
    model_type: str | None = field(
        default=None,
        metadata={"help": "Architecture alone, with the sizes that transformers gives this type, such as llama."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to --config_name or --model_type, such as hidden_size=256,num_hidden_layers=4."},
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None,
        metadata={"help": "Of the weights. Default: the model's own, float32 for an architecture that names none."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not that of the model or config."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})

    def check(self, training_args: TrainingArguments) -> None:
        """Raise `UsageError` unless there is one model, and it can do what is asked."""
        architectures = [name for name in (self.config_name, self.model_type) if name]
        if not self.model_name_or_path and not architectures:
            raise UsageError(
                "Pass --config_name or --model_type to train from a seed, or --model_name_or_path for a pretrained "
                "model."
            )
        if len(architectures) > 1:
            raise UsageError("Pass either --config_name or --model_type, not both.")
        if self.model_type and self.model_name_or_path:
            raise UsageError("Pass either --model_type or --model_name_or_path, not both.")
        if self.model_type and self.model_type not in CONFIG_MAPPING:
            raise UsageError(f"--model_type {self.model_type}: transformers has no such type; gpt2 and llama are two.")
        if self.model_name_or_path and self.config_overrides:
            raise UsageError("--config_overrides would not fit pretrained weights: pass it with --config_name alone.")
        if not training_args.do_train and not self.model_name_or_path:
            name = "--config_name" if self.config_name else "--model_type"
            raise UsageError(f"--do_eval alone with {name} would evaluate a model that was never trained.")
        if is_artifact(self.model_name_or_path) and training_args.do_train:
            raise UsageError(f"{self.model_name_or_path} is a trained artifact: it can be evaluated, not trained on.")


@dataclass
class LottaLoraArguments:
    """What is drawn and what is trained. `LottaLoraConfig` documents the choices."""

    method: Literal["lottalora", "lora", "full"] = field(
        default="lottalora",
        metadata={
            "help": "lottalora; or to compare: lora = the same adapters and trained modules by LoRA over the model as "
            "it is, full = every weight is trained."
        },
    )
    scaffold_seed: int | None = field(
        default=None,
        metadata={"help": "Seed of the scaffold, adapters and trained tensors. Default: --seed, which also shuffles."},
    )
    # torchrun and accelerate take --r for one of their own options.
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapters.", "aliases": ["--r"]})
    lora_alpha: float = field(default=8.0, metadata={"help": "The adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the adapters."})
    family: str = field(
        default="normal",
        metadata={"help": "Distribution of the scaffold.", "choices": list(hf_lottalora.FAMILIES)},
    )
    redraw: Literal["all", "targets", "none"] = field(
        default="all",
        metadata={"help": "What is drawn: every backbone matrix, the adapted ones only, or nothing."},
    )
    residency: Literal["dense", "packed", "streamed"] | None = field(
        default=None,
        metadata={
            "help": "Where the scaffold is: in memory, there as its random bits, or nowhere, drawn at each use. "
            "Default: dense, and for an artifact as it was saved."
        },
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers that get an adapter, or all-linear. Default: the attention projections."},
    )
    embeddings: Literal["train", "frozen", "lora"] = field(
        default="train", metadata={"help": "Embeddings: trained whole, frozen as drawn, or frozen with an adapter."}
    )
    norms: Literal["train", "frozen"] = field(default="train", metadata={"help": "Normalisation layers."})
    head: Literal["train", "lora"] | None = field(
        default=None,
        metadata={
            "help": "Head: trained whole, or frozen with an adapter. Default: train, or what its embedding is, if tied."
        },
    )

    def config(self, seed: int, task_type: str | None) -> hf_lottalora.LottaLoraConfig:
        """The config that these arguments say. Raises `UsageError` for values that are out of range."""
        targets = self.target_modules
        try:
            return hf_lottalora.LottaLoraConfig(
                task_type=task_type,
                seed=seed if self.scaffold_seed is None else self.scaffold_seed,
                r=self.lora_r,
                lora_alpha=self.lora_alpha,
                lora_dropout=self.lora_dropout,
                family=self.family,
                redraw=self.redraw,
                residency=self.residency or "dense",
                target_modules="all-linear" if targets == ["all-linear"] else targets,
                embeddings=self.embeddings,
                norms=self.norms,
                head=self.head,
                init_lora_weights=self.family != "zero",  # B = 0 over W = 0 would pass no gradient back
            )
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error


def is_artifact(path: str | None) -> bool:
    return bool(path) and os.path.isfile(os.path.join(str(path), "adapter_config.json"))


def parse(description: str, *kinds: Any) -> tuple[Any, ...]:
    """The command line as one object of each dataclass; logging is set up for this process.

    The last is TrainingArguments, or a subclass. It is made here, before there is a model: FSDP2 wants it so.
    """
    parsed = HfArgumentParser(kinds, description=description).parse_args_into_dataclasses()
    training_args = parsed[-1]
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        level=logging.INFO if training_args.should_log else logging.WARNING,
        stream=sys.stdout,
    )
    if not training_args.should_log:
        transformers.utils.logging.set_verbosity_error()
    return tuple(parsed)


def check_output_dir(training_args: TrainingArguments) -> None:
    """Resolve --resume_from_checkpoint, and make sure that results can be written and overwrite nothing."""
    folder, resume = training_args.output_dir, training_args.resume_from_checkpoint
    if folder in (None, "trainer_output"):  # Trainer's own default
        raise UsageError("Pass --output_dir: the folder for checkpoints, the model and its metrics.")
    if resume == "last":
        resume = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        if resume is None:
            raise UsageError(f"--resume_from_checkpoint last: there is no checkpoint in {folder}.")
        training_args.resume_from_checkpoint = resume
    if resume and not os.path.isfile(os.path.join(resume, "trainer_state.json")):
        raise UsageError(f"--resume_from_checkpoint {resume}: no checkpoint there (a folder with trainer_state.json).")
    if training_args.local_process_index > 0:
        return
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UsageError(f"--output_dir {folder} is a file.")
    if training_args.do_train and not resume and os.path.isdir(folder) and os.listdir(folder):
        raise UsageError(
            f"--output_dir {folder} is not empty. Choose another, or go on with --resume_from_checkpoint last."
        )
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--output_dir {folder} cannot be written to: {error.strerror}.") from error


def check_arguments(
    model_args: ModelArguments,
    data_args: Any,
    lottalora_args: LottaLoraArguments,
    training_args: TrainingArguments,
    task_type: str | None = None,
) -> None:
    """Raise `UsageError` for what cannot work, before anything is loaded or written."""
    if training_args.do_predict or not (training_args.do_train or training_args.do_eval):
        raise UsageError("Pass --do_train, --do_eval or both. There is no --do_predict.")
    model_args.check(training_args)
    data_args.check(training_args.do_train)
    lottalora_args.config(training_args.seed, task_type)
    check_output_dir(training_args)


def run(main: Callable[[], None]) -> None:
    """Run a script: what the user can put right ends it with one line."""
    try:
        main()
    except UsageError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
