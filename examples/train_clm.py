"""Train a causal language model with LottaLoRA on text: files of your own, or a data set on the hub.

From a seed (an architecture, no pretrained weights), with a tokenizer made of the text:

    python examples/train_clm.py --config_name examples/configs/llama-30m --train_tokenizer 32000 \\
        --train_file train.txt --validation_file valid.txt --block_size 128 --do_train --do_eval \\
        --lora_r 8 --lora_alpha 16 --learning_rate 1e-3 --output_dir out/llama

`examples/configs` has the paper's five Llamas; any other of transformers is a `--config_name` or a `--model_type` with
`--config_overrides`. `--family binary --residency packed` keeps one bit of a weight in memory, `--residency streamed`
none. On a pretrained model: `--model_name_or_path NAME --redraw targets`. Without LottaLoRA, to compare:
`--method lora` or `--method full`.

Several processes, on GPUs, and on a CPU:

    accelerate launch --num_processes 2 examples/train_clm.py ...
    accelerate launch --config_file examples/configs/fsdp2.yaml examples/train_clm.py ...
    torchrun --standalone --nproc_per_node 2 examples/train_clm.py --use_cpu ...
"""

from __future__ import annotations

import math
from typing import Any

from arguments import LottaLoraArguments, ModelArguments, UsageError, check_arguments, is_artifact, parse, run
from clm_data import DataArguments, trained_tokenizer
from torch import nn
from training import (
    check_vocabulary,
    evaluates,
    input_length,
    load_artifact,
    load_config,
    load_model,
    load_tokenizer,
    new_trainer,
    train_and_evaluate,
    with_method,
)
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

TASK_TYPE = "CAUSAL_LM"
BLOCK_SIZE = 1_024  # where nothing says less


class LanguageModelTrainer(Trainer):
    """Logs the perplexity beside the loss of each evaluation."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "eval_loss" in logs:  # this dictionary is also what `evaluate` returns
            loss = logs["eval_loss"]
            logs["eval_perplexity"] = math.exp(loss) if loss < 700 else math.inf
        super().log(logs, *args, **kwargs)


def check_text(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Raise `UsageError` for options of the text that go with others only."""
    if data_args.train_tokenizer and (model_args.tokenizer_name or model_args.model_name_or_path):
        raise UsageError("--train_tokenizer makes a new one: pass it without --tokenizer_name or --model_name_or_path.")
    if data_args.streaming and training_args.do_train and training_args.max_steps < 1:
        raise UsageError("--streaming needs --max_steps: how long a stream is, nobody knows.")


def architecture(model_args: ModelArguments, data_args: DataArguments) -> PreTrainedConfig:
    config = load_config(model_args)
    size = config.get_text_config().vocab_size
    if data_args.train_tokenizer and data_args.train_tokenizer > size:
        raise UsageError(
            f"--train_tokenizer {data_args.train_tokenizer}: the model has {size} tokens. Pass fewer, or "
            "--config_overrides vocab_size=..."
        )
    return config


def tokenizer_of(model_args: ModelArguments) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(model_args)
    except UsageError as error:
        raise UsageError(f"{error} Or --train_tokenizer 32000, which makes one of the text.") from error


def language_model(
    model_args: ModelArguments,
    lottalora_args: LottaLoraArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> nn.Module:
    """The base model, or a whole artifact."""
    check_vocabulary(config, tokenizer)
    if is_artifact(model_args.model_name_or_path):
        return load_artifact(AutoModelForCausalLM, model_args, lottalora_args)
    if not model_args.model_name_or_path:
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(tokenizer, name) is not None:
                setattr(config, name, getattr(tokenizer, name))
    return load_model(AutoModelForCausalLM, config, model_args, lottalora_args)


def main() -> None:
    model_args, data_args, lottalora_args, training_args = parse(
        __doc__.partition("\n")[0], ModelArguments, DataArguments, LottaLoraArguments, TrainingArguments
    )
    check_text(model_args, data_args, training_args)
    check_arguments(model_args, data_args, lottalora_args, training_args, TASK_TYPE)
    set_seed(training_args.seed)

    config = architecture(model_args, data_args)
    with training_args.main_process_first(desc="reading the text"):
        options = {"streaming": data_args.streaming, "cache_dir": model_args.cache_dir}
        sets = data_args.load(training_args.do_train, evaluates(training_args), **options)
        if data_args.train_tokenizer:
            tokenizer = trained_tokenizer(sets["train"], data_args.train_tokenizer, model_args.cache_dir)
        else:
            tokenizer = tokenizer_of(model_args)
    model = language_model(model_args, lottalora_args, config, tokenizer)
    length = input_length(data_args.block_size, model, tokenizer, default=BLOCK_SIZE)
    with training_args.main_process_first(desc="tokenising the text"):
        sets = {split: data_args.blocks(split, rows, tokenizer, length) for split, rows in sets.items()}
    if training_args.do_train:
        model = with_method(model, lottalora_args, training_args.seed, TASK_TYPE)

    trainer = new_trainer(
        LanguageModelTrainer,
        model,
        lottalora_args,
        args=training_args,
        train_dataset=sets.get("train"),
        eval_dataset=sets.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    train_and_evaluate(trainer, {"": sets.get("validation")})


if __name__ == "__main__":
    run(main)
