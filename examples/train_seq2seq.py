"""Train an encoder and a decoder with LottaLoRA on pairs of texts: translation, summaries, questions and answers.

From a seed (an architecture, no pretrained weights), on a csv, json(l) or parquet file with two columns of texts:

    python examples/train_seq2seq.py --config_name google-t5/t5-small --train_file pairs.csv --source_column english \\
        --target_column french --lora_r 16 --lora_alpha 16 --do_train --do_eval --predict_with_generate \\
        --learning_rate 1e-3 --output_dir out/pairs

On a pretrained model, adapters with beta alone: `--model_name_or_path NAME --redraw none`. Without LottaLoRA, to
compare: `--method lora` or `--method full`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import data_files
import numpy as np
from arguments import LottaLoraArguments, ModelArguments, UsageError, check_arguments, is_artifact, parse, run
from classification import check_column
from datasets import Dataset
from torch import nn
from training import (
    check_vocabulary,
    evaluates,
    load_artifact,
    load_config,
    load_model,
    load_tokenizer,
    new_trainer,
    train_and_evaluate,
    with_method,
)
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

TASK_TYPE = "SEQ_2_SEQ_LM"


@dataclass
class DataArguments(data_files.DataArguments):
    """Which pairs of texts, and how much of each."""

    source_column: str = field(default="source", metadata={"help": "Column of the texts that are read."})
    target_column: str = field(default="target", metadata={"help": "Column of the texts that are to be written."})
    source_prefix: str = field(default="", metadata={"help": "Put before each source, as a pretrained T5 wants it."})
    max_source_length: int = field(default=128, metadata={"help": "Longer sources are truncated to so many tokens."})
    max_target_length: int = field(default=128, metadata={"help": "Longer targets are truncated to so many tokens."})

    def check(self, do_train: bool) -> None:
        super().check(do_train)
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, got {getattr(self, name)}.")

    def tokens(self, split: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """The first so many pairs as tokens."""
        for name in ("source_column", "target_column"):
            check_column(split, rows, getattr(self, name), name)
            kind = getattr(rows.features[getattr(self, name)], "dtype", None)
            if kind not in ("string", "large_string"):
                raise UsageError(f"{split}: column {getattr(self, name)!r}: text expected, found {kind}.")

        def encode(pairs: dict[str, list[str]]) -> Any:
            sources = [self.source_prefix + text for text in pairs[self.source_column]]
            inputs = tokenizer(sources, max_length=self.max_source_length, truncation=True)
            targets = tokenizer(
                text_target=pairs[self.target_column], max_length=self.max_target_length, truncation=True
            )
            return {**inputs, "labels": targets["input_ids"]}

        rows = self.first(split, rows)
        options = self.map_options(rows, f"tokenising {split}")
        return rows.map(encode, batched=True, remove_columns=rows.column_names, **options)


def sequence_model(
    args: ModelArguments, lottalora_args: LottaLoraArguments, tokenizer: PreTrainedTokenizerBase
) -> nn.Module:
    """The base model, of an architecture alone with the tokenizer's ends and padding, or a whole artifact."""
    if is_artifact(args.model_name_or_path):
        return load_artifact(AutoModelForSeq2SeqLM, args, lottalora_args)
    config = load_config(args)
    check_vocabulary(config, tokenizer)
    if not args.model_name_or_path:
        if tokenizer.eos_token is None:
            tokenizer.eos_token = tokenizer.sep_token  # Trainer gives the model the tokenizer's
        end = tokenizer.eos_token_id
        start = getattr(config, "decoder_start_token_id", None)
        # Decoding starts with the end of a text in BART, and with padding in T5.
        ends = start is not None and start == config.eos_token_id
        config.decoder_start_token_id = end if ends else tokenizer.pad_token_id
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, end
        if getattr(config, "forced_eos_token_id", None) is not None:
            config.forced_eos_token_id = end
        if getattr(config, "bos_token_id", None) is not None:
            config.bos_token_id = tokenizer.bos_token_id
    return load_model(AutoModelForSeq2SeqLM, config, args, lottalora_args)


def exact_match(tokenizer: PreTrainedTokenizerBase) -> Callable[[EvalPrediction], dict[str, float]]:
    """Of what was generated, the share that is the target, letter by letter."""

    def text(ids: np.ndarray) -> list[str]:
        filled = np.where(ids < 0, tokenizer.pad_token_id, ids)
        return [line.strip() for line in tokenizer.batch_decode(filled, skip_special_tokens=True)]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        found, wanted = text(prediction.predictions), text(prediction.label_ids)
        return {"exact_match": float(np.mean([one == other for one, other in zip(found, wanted, strict=True)]))}

    return compute


def main() -> None:
    model_args, data_args, lottalora_args, training_args = parse(
        __doc__.partition("\n")[0], ModelArguments, DataArguments, LottaLoraArguments, Seq2SeqTrainingArguments
    )
    check_arguments(model_args, data_args, lottalora_args, training_args, TASK_TYPE)
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(model_args)
    if tokenizer.pad_token is None:
        raise UsageError("The tokenizer has no token to pad with. Pass another --tokenizer_name.")
    with training_args.main_process_first(desc="reading the pairs"):
        sets = data_args.load(training_args.do_train, evaluates(training_args), cache_dir=model_args.cache_dir)
        sets = {split: data_args.tokens(split, rows, tokenizer) for split, rows in sets.items()}
    model = sequence_model(model_args, lottalora_args, tokenizer)
    if training_args.do_train:
        model = with_method(model, lottalora_args, training_args.seed, TASK_TYPE)
    if training_args.generation_max_length is None:
        training_args.generation_max_length = data_args.max_target_length

    trainer = new_trainer(
        Seq2SeqTrainer,
        model,
        lottalora_args,
        args=training_args,
        train_dataset=sets.get("train"),
        eval_dataset=sets.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=exact_match(tokenizer) if training_args.predict_with_generate else None,
    )
    train_and_evaluate(trainer, {"": sets.get("validation")})


if __name__ == "__main__":
    run(main)
