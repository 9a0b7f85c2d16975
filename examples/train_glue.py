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

from arguments import LottaLoraArguments, ModelArguments, UsageError, check_output_dir, parse, run
from classification import classifier_config, load_classifier
from glue_data import DataArguments, TextData, load_text_data
from torch import nn
from training import (
    check_vocabulary,
    evaluates,
    input_length,
    load_tokenizer,
    new_trainer,
    train_and_evaluate,
    with_method,
)
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

TASK_TYPE = "SEQ_CLS"


def check_arguments(
    model_args: ModelArguments,
    data_args: DataArguments,
    lottalora_args: LottaLoraArguments,
    training_args: TrainingArguments,
) -> None:
    """Raise `UsageError` for what cannot work, before anything is loaded or written."""
    if training_args.do_predict or not (training_args.do_train or training_args.do_eval):
        raise UsageError("Pass --do_train, --do_eval or both. There is no --do_predict: GLUE's test labels are secret.")
    model_args.check(training_args)
    data_args.check(training_args.do_train, evaluates(training_args))
    lottalora_args.config(training_args.seed, TASK_TYPE)
    check_output_dir(training_args)


def classifier(
    model_args: ModelArguments, lottalora_args: LottaLoraArguments, data: TextData, tokenizer: PreTrainedTokenizerBase
) -> nn.Module:
    """The base model with a head for the data's labels, or a whole artifact."""
    config = classifier_config(model_args, ["score"] if data.labels is None else data.labels)
    config.problem_type = "regression" if data.labels is None else "single_label_classification"
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    check_vocabulary(config, tokenizer)
    return load_classifier(AutoModelForSequenceClassification, config, model_args, lottalora_args)


def main() -> None:
    model_args, data_args, lottalora_args, training_args = parse(
        __doc__.partition("\n")[0], ModelArguments, DataArguments, LottaLoraArguments, TrainingArguments
    )
    check_arguments(model_args, data_args, lottalora_args, training_args)
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(model_args)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with training_args.main_process_first(desc="reading the data"):
        data = load_text_data(data_args, model_args.cache_dir)
    if not training_args.do_train:
        data.sets.pop("train", None)
    model = classifier(model_args, lottalora_args, data, tokenizer)
    length = input_length(data_args.max_seq_length, model, tokenizer)
    with training_args.main_process_first(desc="tokenising the data"):
        data.tokenise(tokenizer, length, data_args)
    if training_args.do_train:
        model = with_method(model, lottalora_args, training_args.seed, TASK_TYPE)

    evaluation = data.evaluation if evaluates(training_args) else {}
    trainer = new_trainer(
        Trainer,
        model,
        lottalora_args,
        args=training_args,
        train_dataset=data.sets["train"] if training_args.do_train else None,
        eval_dataset=evaluation.get(""),
        processing_class=tokenizer,
        data_collator=default_data_collator if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer),
        compute_metrics=data.compute_metrics,
    )
    train_and_evaluate(trainer, evaluation)


if __name__ == "__main__":
    run(main)
