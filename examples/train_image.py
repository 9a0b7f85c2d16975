"""Train an image classifier with LottaLoRA on a folder of pictures, or on a table of them.

From a seed (an architecture, no pretrained weights), on a folder with a folder of pictures for each class:

    python examples/train_image.py --model_type vit --config_overrides \\
        image_size=32,patch_size=4,hidden_size=192,intermediate_size=768,num_hidden_layers=6,num_attention_heads=3 \\
        --train_dir pictures --lora_r 16 --target_modules all-linear --do_train --do_eval --learning_rate 1e-3 \\
        --output_dir out/pictures

A table is `--train_file` with a column of pictures (the bytes of JPEG or PNG files) and one of labels. Noise in a
pretrained network: `--model_name_or_path NAME --redraw targets`. Without LottaLoRA, to compare: `--method lora` or
`--method full`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from arguments import LottaLoraArguments, ModelArguments, UsageError, check_arguments, parse, run
from classification import (
    accuracy,
    check_column,
    class_names,
    classifier_config,
    load_classifier,
    with_class_numbers,
)
from data_files import FolderArguments, said_of
from datasets import Dataset, Image, load_dataset
from training import evaluates, new_trainer, train_and_evaluate, with_method
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
    default_data_collator,
    set_seed,
)


@dataclass
class DataArguments(FolderArguments):
    """Which pictures: `--dataset_name` on the hub, a folder, or a table."""

    image_column_name: str = field(default="image", metadata={"help": "Column of the pictures."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the classes, names or numbers."})
    image_processor_name: str | None = field(
        default=None,
        metadata={
            "help": "What scales the pictures. Default: the pretrained model's, and for an architecture alone its "
            "image_size, with values in [-1, 1]."
        },
    )

    def read_folder(self, folder: str, **options: Any) -> Dataset:
        with said_of(folder):
            return load_dataset("imagefolder", data_dir=folder, split="train", **options)

    def checked(self, split: str, rows: Dataset) -> Dataset:
        """`rows` with pictures; raises `UsageError` for columns that are missing or of another kind."""
        check_column(split, rows, self.image_column_name, "image_column_name")
        check_column(split, rows, self.label_column_name, "label_column_name")
        kind = rows.features[self.image_column_name]
        if isinstance(kind, Image):
            return rows
        if str(kind.dtype) not in ("binary", "large_binary", "string"):
            raise UsageError(f"{split}: column {self.image_column_name!r}: pictures expected, found {kind.dtype}.")
        return rows.cast_column(self.image_column_name, Image())


def image_processor(args: ModelArguments, data_args: DataArguments, config: PreTrainedConfig) -> Any:
    name = data_args.image_processor_name or args.model_name_or_path
    if name:
        return AutoImageProcessor.from_pretrained(name, cache_dir=args.cache_dir, revision=args.model_revision)
    size = getattr(config, "image_size", 224)  # networks of convolutions alone take any
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return ViTImageProcessor(size={"height": height, "width": width})


def pixels(processor: Any, column: str) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
    """What makes inputs of rows, when they are needed."""

    def prepared(rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in rows[column]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": rows["labels"]}

    return prepared


def main() -> None:
    model_args, data_args, lottalora_args, training_args = parse(
        __doc__.partition("\n")[0], ModelArguments, DataArguments, LottaLoraArguments, TrainingArguments
    )
    check_arguments(model_args, data_args, lottalora_args, training_args)
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="reading the pictures"):
        sets = data_args.load(training_args.do_train, evaluates(training_args), cache_dir=model_args.cache_dir)
        sets = {split: data_args.first(split, data_args.checked(split, rows)) for split, rows in sets.items()}
        names = class_names(sets["train"], data_args.label_column_name) if training_args.do_train else None
        config = classifier_config(model_args, names)
        sets = with_class_numbers(sets, data_args.label_column_name, list(config.id2label.values()))
    processor = image_processor(model_args, data_args, config)
    model = load_classifier(AutoModelForImageClassification, config, model_args, lottalora_args)
    if training_args.do_train:
        model = with_method(model, lottalora_args, training_args.seed)
    inputs = pixels(processor, data_args.image_column_name)
    sets = {split: rows.with_transform(inputs) for split, rows in sets.items()}
    training_args.remove_unused_columns = False  # the transform makes inputs of them

    trainer = new_trainer(
        Trainer,
        model,
        lottalora_args,
        args=training_args,
        train_dataset=sets.get("train"),
        eval_dataset=sets.get("validation"),
        processing_class=processor,
        data_collator=default_data_collator,
        compute_metrics=accuracy,
    )
    train_and_evaluate(trainer, {"": sets.get("validation")})


if __name__ == "__main__":
    run(main)
