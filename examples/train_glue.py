"""Train a text classifier or regressor with LottaLoRA on a GLUE task, or on your own csv, json or parquet files.

From a seed (an architecture, no pretrained weights):

    python examples/train_glue.py --config_name google-bert/bert-base-uncased \\
        --tokenizer_name google-bert/bert-base-uncased --config_overrides hidden_size=256,num_hidden_layers=4 \\
        --task_name sst2 --lora_r 8 --do_train --do_eval --learning_rate 1e-3 --output_dir out/sst2

On a pretrained model, with noise in place of its attention projections: `--model_name_or_path NAME --redraw targets`.
The same training without LottaLoRA, to compare: `--method lora` or `--method full`.

Several processes, on GPUs, and on a CPU, where `accelerate launch --cpu --num_processes 2` silently starts one (the log
says how many there are):

    accelerate launch --num_processes 2 examples/train_glue.py ...
    torchrun --standalone --nproc_per_node 2 examples/train_glue.py --use_cpu ...
"""

from __future__ import annotations

import hf_lottalora  # isort: skip  # first: it registers the method with PEFT
import logging
import os
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Literal

import transformers
from glue_data import DataArguments, TextData, UsageError, load_text_data
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

logger = logging.getLogger(__name__)


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
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to --config_name, such as hidden_size=256,num_hidden_layers=4."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not that of the model or config."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})


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
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers that get an adapter, or all-linear. Default: the attention projections."},
    )
    embeddings: Literal["train", "frozen", "lora"] = field(
        default="train", metadata={"help": "Embeddings: trained whole, frozen as drawn, or frozen with an adapter."}
    )
    norms: Literal["train", "frozen"] = field(default="train", metadata={"help": "Normalisation layers."})
    head: Literal["train", "lora"] = field(
        default="train", metadata={"help": "Classification head: trained whole, or frozen with an adapter."}
    )

    def config(self, seed: int) -> hf_lottalora.LottaLoraConfig:
        targets = self.target_modules
        return hf_lottalora.LottaLoraConfig(
            task_type="SEQ_CLS",
            seed=seed if self.scaffold_seed is None else self.scaffold_seed,
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            family=self.family,
            redraw=self.redraw,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            embeddings=self.embeddings,
            norms=self.norms,
            head=self.head,
            init_lora_weights=self.family != "zero",  # B = 0 over W = 0 would pass no gradient back
        )


def check_arguments(
    model_args: ModelArguments,
    data_args: DataArguments,
    lottalora_args: LottaLoraArguments,
    training_args: TrainingArguments,
) -> None:
    """Raise `UsageError` for what cannot work, before anything is loaded or written."""
    if training_args.do_predict or not (training_args.do_train or training_args.do_eval):
        raise UsageError("Pass --do_train, --do_eval or both. There is no --do_predict: GLUE's test labels are secret.")
    if not model_args.model_name_or_path and not model_args.config_name:
        raise UsageError("Pass --config_name to train from a seed, or --model_name_or_path for a pretrained model.")
    if model_args.model_name_or_path and model_args.config_overrides:
        raise UsageError("--config_overrides would not fit pretrained weights: pass it with --config_name alone.")
    if not training_args.do_train and not model_args.model_name_or_path:
        raise UsageError("--do_eval alone with --config_name would evaluate a model that was never trained.")
    if is_artifact(model_args.model_name_or_path) and training_args.do_train:
        raise UsageError(f"{model_args.model_name_or_path} is a trained artifact: it can be evaluated, not trained on.")
    data_args.check(training_args.do_train, training_args.do_eval or training_args.eval_strategy != "no")
    try:
        lottalora_args.config(training_args.seed)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    check_output_dir(training_args)


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


def is_artifact(path: str | None) -> bool:
    return bool(path) and os.path.isfile(os.path.join(str(path), "adapter_config.json"))


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    name = args.tokenizer_name or args.model_name_or_path or args.config_name
    tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=args.cache_dir, revision=args.model_revision)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UsageError(f"{name} has no tokenizer with a vocabulary. Pass --tokenizer_name.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(args: ModelArguments, data: TextData, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The base model with a head for the data's labels, or a whole artifact."""
    labels = ["score"] if data.labels is None else data.labels
    if is_artifact(args.model_name_or_path):
        model = hf_lottalora.AutoLottaLoraModelForSequenceClassification.from_pretrained(args.model_name_or_path)
        known = list(model.config.id2label.values())
        if known != labels:
            raise UsageError(f"{args.model_name_or_path} was trained on the labels {known}, the data has {labels}.")
        return model
    hub = {"cache_dir": args.cache_dir, "revision": args.model_revision}
    config = AutoConfig.from_pretrained(args.config_name or args.model_name_or_path, num_labels=len(labels), **hub)
    if args.config_overrides:
        try:
            config.update_from_string(args.config_overrides)
        except ValueError as error:
            raise UsageError(f"--config_overrides {args.config_overrides}: {error}.") from error
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = "regression" if data.labels is None else "single_label_classification"
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > config.vocab_size:
        raise UsageError(
            f"The tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}: they do not belong together. "
            "Pass another --tokenizer_name, or --config_overrides vocab_size=..."
        )
    if args.model_name_or_path:
        return AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, config=config, **hub)
    return AutoModelForSequenceClassification.from_config(config)


def input_length(wanted: int, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """As many tokens as wanted, or as tokenizer and model take."""
    length = min(wanted, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or wanted)
    if length < wanted:
        logger.warning("Inputs are cut to %d tokens: tokenizer or model take no more.", length)
    return length


def with_method(model: nn.Module, args: LottaLoraArguments, seed: int) -> nn.Module:
    """Make `model` trainable by `--method`, and log the plan."""
    if args.method == "full":
        return model
    config = args.config(seed)
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
        task_type="SEQ_CLS",
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


def main() -> None:
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, LottaLoraArguments, TrainingArguments), description=__doc__.partition("\n")[0]
    )
    model_args, data_args, lottalora_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        level=logging.INFO if training_args.should_log else logging.WARNING,
        stream=sys.stdout,
    )
    if not training_args.should_log:
        transformers.utils.logging.set_verbosity_error()
    check_arguments(model_args, data_args, lottalora_args, training_args)
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(model_args)
    with training_args.main_process_first(desc="reading the data"):
        data = load_text_data(data_args, model_args.cache_dir)
    if not training_args.do_train:
        data.sets.pop("train", None)
    model = load_model(model_args, data, tokenizer)
    # Sequence classifiers return a batch's mean loss. Trainer takes them to divide by the whole step's rows, and would
    # scale their gradients by the number of processes and of accumulated batches.
    model.accepts_loss_kwargs = False
    length = input_length(data_args.max_seq_length, model, tokenizer)
    with training_args.main_process_first(desc="tokenising the data"):
        data.tokenise(tokenizer, length, data_args)
    if training_args.do_train:
        model = with_method(model, lottalora_args, training_args.seed)
    log_sizes(model, training_args)

    if training_args.ddp_find_unused_parameters is None:
        training_args.ddp_find_unused_parameters = False  # every trained parameter takes part in every step
    evaluate = training_args.do_eval or training_args.eval_strategy != "no"
    evaluation = data.evaluation if evaluate else {}
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data.sets["train"] if training_args.do_train else None,
        eval_dataset=evaluation.get(""),
        processing_class=tokenizer,
        data_collator=default_data_collator if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer),
        compute_metrics=data.compute_metrics,
        callbacks=[hf_lottalora.RanksAgreeCallback()] if lottalora_args.method == "lottalora" else None,
    )
    if training_args.do_train:
        metrics = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics
        metrics["train_samples"] = len(data.sets["train"])
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = {}
        for suffix, rows in evaluation.items():
            scores = trainer.evaluate(rows)
            metrics |= {f"{name}{suffix}": value for name, value in scores.items()}
            metrics[f"eval_samples{suffix}"] = len(rows)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"train_glue.py: error: {error}")
