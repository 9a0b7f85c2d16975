"""Train a classifier of sounds with LottaLoRA on a folder with a folder of WAV files for each class.

From a seed (an architecture, no pretrained weights):

    python examples/train_speech.py --model_type wav2vec2 --config_overrides \\
        hidden_size=128,num_hidden_layers=4,num_attention_heads=4,intermediate_size=512,classifier_proj_size=64 \\
        --train_dir speech_commands --max_length_seconds 1 --lora_r 8 --do_train --do_eval --learning_rate 1e-3 \\
        --output_dir out/words

Noise in a pretrained network: `--model_name_or_path NAME --redraw targets`. Without LottaLoRA, to compare:
`--method lora` or `--method full`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from arguments import LottaLoraArguments, ModelArguments, UsageError, check_arguments, parse, run
from classification import (
    accuracy,
    check_column,
    class_names,
    classifier_config,
    load_classifier,
    with_class_numbers,
)
from data_files import FolderArguments
from datasets import Audio, ClassLabel, Dataset, Features, Value
from scipy.io import wavfile
from scipy.signal import resample_poly
from training import evaluates, new_trainer, train_and_evaluate, with_method
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    Trainer,
    TrainingArguments,
    Wav2Vec2FeatureExtractor,
    default_data_collator,
    set_seed,
)


@dataclass
class DataArguments(FolderArguments):
    """Which sounds: `--dataset_name` on the hub, a folder, or a table. WAV files, which SciPy reads."""

    audio_column_name: str = field(default="audio", metadata={"help": "Column of the sounds."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the classes, names or numbers."})
    max_length_seconds: float = field(default=1.0, metadata={"help": "Sounds are cut, or filled up, to this length."})
    feature_extractor_name: str | None = field(
        default=None,
        metadata={
            "help": "What scales the waves. Default: the pretrained model's, and for an architecture alone 16 kHz, "
            "each of mean 0 and variance 1."
        },
    )

    def check(self, do_train: bool) -> None:
        super().check(do_train)
        if self.max_length_seconds <= 0:
            raise UsageError(f"--max_length_seconds must be positive, got {self.max_length_seconds}.")

    def read_folder(self, folder: str, **options: Any) -> Dataset:
        """Not by `audiofolder`, which needs torchcodec."""
        files = sorted(Path(folder).glob("*/*.wav"))
        classes = sorted({file.parent.name for file in files})
        if not classes:
            raise UsageError(f"{folder}: no WAV file there. A folder for each class expected, such as yes/0.wav.")
        features = Features({"audio": Value("string"), "label": ClassLabel(names=classes)})
        rows = {"audio": [str(file) for file in files], "label": [file.parent.name for file in files]}
        return Dataset.from_dict(rows, features)

    def checked(self, split: str, rows: Dataset) -> Dataset:
        """`rows` with sounds as they are in the files; raises `UsageError` for columns of another kind."""
        check_column(split, rows, self.audio_column_name, "audio_column_name")
        check_column(split, rows, self.label_column_name, "label_column_name")
        kind = rows.features[self.audio_column_name]
        if isinstance(kind, Audio):
            return rows.cast_column(self.audio_column_name, Audio(decode=False))
        if getattr(kind, "dtype", None) not in ("string", "large_string", "binary", "large_binary"):
            raise UsageError(f"{split}: column {self.audio_column_name!r}: WAV files expected, found {kind}.")
        return rows


def wave(sound: str | bytes | dict[str, Any], rate: int) -> np.ndarray:
    """The samples of a WAV file, of shape (length,), at `rate` a second; of several channels their mean.

    Args:
        sound: the file's path, its bytes, or a dictionary of both as `datasets` has it.
        rate: samples a second.
    """
    if isinstance(sound, dict):
        sound = sound["bytes"] or sound["path"]
    try:
        own, samples = wavfile.read(io.BytesIO(sound) if isinstance(sound, bytes) else sound)
    except (OSError, ValueError) as error:
        name = "a row" if isinstance(sound, bytes) else sound
        raise UsageError(f"{name}: not a WAV file that SciPy reads: {error}") from error
    samples = samples.astype(np.float32)
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    shared = gcd(own, rate)
    return mono if own == rate else resample_poly(mono, rate // shared, own // shared)


def features(extractor: Any, column: str, seconds: float) -> Callable[[dict[str, list[Any]]], Any]:
    """What makes inputs of rows, for `map`."""
    rate = extractor.sampling_rate

    def prepared(rows: dict[str, list[Any]]) -> Any:
        waves = [wave(sound, rate) for sound in rows[column]]
        options = {"max_length": int(rate * seconds), "truncation": True, "padding": "max_length"}
        return extractor(waves, sampling_rate=rate, **options)

    return prepared


def feature_extractor(args: ModelArguments, data_args: DataArguments) -> Any:
    name = data_args.feature_extractor_name or args.model_name_or_path
    if name:
        return AutoFeatureExtractor.from_pretrained(name, cache_dir=args.cache_dir, revision=args.model_revision)
    return Wav2Vec2FeatureExtractor(sampling_rate=16_000, do_normalize=True)


def main() -> None:
    model_args, data_args, lottalora_args, training_args = parse(
        __doc__.partition("\n")[0], ModelArguments, DataArguments, LottaLoraArguments, TrainingArguments
    )
    check_arguments(model_args, data_args, lottalora_args, training_args)
    set_seed(training_args.seed)

    extractor = feature_extractor(model_args, data_args)
    inputs = features(extractor, data_args.audio_column_name, data_args.max_length_seconds)
    with training_args.main_process_first(desc="reading the sounds"):
        sets = data_args.load(training_args.do_train, evaluates(training_args), cache_dir=model_args.cache_dir)
        sets = {split: data_args.first(split, data_args.checked(split, rows)) for split, rows in sets.items()}
        names = class_names(sets["train"], data_args.label_column_name) if training_args.do_train else None
        config = classifier_config(model_args, names)
        sets = with_class_numbers(sets, data_args.label_column_name, list(config.id2label.values()))
        for split, rows in sets.items():
            columns = [name for name in rows.column_names if name != "labels"]
            options = data_args.map_options(rows, f"preparing {split}")
            sets[split] = rows.map(inputs, batched=True, batch_size=100, remove_columns=columns, **options)
    model = load_classifier(AutoModelForAudioClassification, config, model_args, lottalora_args)
    if training_args.do_train:
        model = with_method(model, lottalora_args, training_args.seed)

    trainer = new_trainer(
        Trainer,
        model,
        lottalora_args,
        args=training_args,
        train_dataset=sets.get("train"),
        eval_dataset=sets.get("validation"),
        processing_class=extractor,
        data_collator=default_data_collator,
        compute_metrics=accuracy,
    )
    train_and_evaluate(trainer, {"": sets.get("validation")})


if __name__ == "__main__":
    run(main)
