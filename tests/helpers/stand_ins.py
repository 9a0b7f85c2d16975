"""What the documentation's examples get in the place of what is large, far away or takes long.

The examples run as they are printed but for `SHORTER`. Names of the hub are served by the tests' own hub: small models
of the same architecture (`MODELS`), with one small tokenizer. `load_dataset` gives a few made-up rows of the same
columns (`DATASETS`); for files of the user's, `write_files` puts some into the folder where the example runs.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from hub import Files, Repo
from safetensors.torch import save
from scipy.io import wavfile
from tiny import SIZES, gpt2, t5
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

# Patterns of the examples' text and what is run in their place. Each is needed by some page.
SHORTER = {r"num_train_epochs=\d+": "max_steps=1"}


def shorter(code: str) -> str:
    for printed, run in SHORTER.items():
        code = re.sub(printed, run, code)
    return code


# ---- data -------------------------------------------------------------------------------------------------------------

_WORDS = ["a", "the", "film", "plot", "is", "was", "good", "bad", "dull", "fine", "warm", "slow", "quite", "and"]


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(4, 9)))


def _splits(row: Callable[[random.Random], dict[str, Any]], features: Features | None, *others: str) -> DatasetDict:
    rng = random.Random(0)
    sizes = {"train": 16, **dict.fromkeys(others, 8)}
    rows = {split: [row(rng) for _ in range(size)] for split, size in sizes.items()}
    return DatasetDict({split: Dataset.from_list(found, features=features) for split, found in rows.items()})


def _sst2() -> DatasetDict:
    labels = ClassLabel(names=["negative", "positive"])
    features = Features({"idx": Value("int32"), "sentence": Value("string"), "label": labels})
    return _splits(lambda r: {"idx": 0, "sentence": _sentence(r), "label": r.randrange(2)}, features, "validation")


def _wikitext() -> DatasetDict:
    return _splits(lambda r: {"text": r.choice(["", _sentence(r) * 9])}, None, "validation", "test")


def _opus_books() -> DatasetDict:
    return _splits(lambda r: {"id": "0", "translation": {"en": _sentence(r), "fr": _sentence(r)}}, None)


def _cifar10() -> DatasetDict:
    features = Features({"img": Image(), "label": ClassLabel(num_classes=10)})

    def row(rng: random.Random) -> dict[str, Any]:
        return {"img": np.full((32, 32, 3), rng.randrange(256), np.uint8), "label": rng.randrange(10)}

    return _splits(row, features, "test")


DATASETS: dict[str, Callable[[], DatasetDict]] = {
    "stanfordnlp/sst2": _sst2,
    "Salesforce/wikitext": _wikitext,
    "Helsinki-NLP/opus_books": _opus_books,
    "uoft-cs/cifar10": _cifar10,
}


def load(name: str, *config: str, split: str | None = None, **local: Any) -> Any:
    """In the place of `datasets.load_dataset`; the real one where the data are files of the user's."""
    if local:
        return load_dataset(name, *config, split=split, **local)
    rows = DATASETS[name]()
    return rows if split is None else rows[split]


def write_files(folder: Path) -> None:
    """Recordings: a second each of two words, as in the Speech Commands data set."""
    for word, pitch in (("yes", 440), ("no", 220)):
        (folder / "speech_commands" / word).mkdir(parents=True)
        for number in range(3):
            wave = np.sin(np.arange(16_000) * (pitch + number) * 2 * np.pi / 16_000)
            file = folder / "speech_commands" / word / f"{number}.wav"
            wavfile.write(file, 16_000, (9_999 * wave).astype(np.int16))


# ---- the hub ----------------------------------------------------------------------------------------------------------


@cache
def _tokenizer() -> Files:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate([*special, *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 4)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>", "model_max_length": 64}
    config = {"tokenizer_class": PreTrainedTokenizerFast.__name__, **names}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def _repo(config: PreTrainedConfig, *others: Files, model: type[nn.Module] | None = None) -> Repo:
    """A repository with this config.json, with weights if there is a class that has them, and with other files."""
    files = {"config.json": config.to_json_string(use_diff=False).encode()}
    if model is not None:
        tensors = {key: value.contiguous() for key, value in model(config).state_dict().items()}
        files["model.safetensors"] = save(tensors, metadata={"format": "pt"})
    repo = Repo()
    repo.commit({key: value for part in (files, *others) for key, value in part.items()})
    return repo


def _vit() -> ViTConfig:
    return ViTConfig(**{**SIZES, "vocab_size": None}, image_size=32, patch_size=16)


MODELS: dict[str, Callable[[], Repo]] = {
    "google-bert/bert-base-uncased": lambda: _repo(BertConfig(**SIZES), _tokenizer(), model=BertModel),
    "openai-community/gpt2": lambda: _repo(gpt2(n_positions=64).config, _tokenizer()),
    "google-t5/t5-small": lambda: _repo(t5().config, _tokenizer()),
    "google/vit-base-patch16-224-in21k": lambda: _repo(_vit(), model=ViTModel),
}


def repositories(text: str) -> dict[str, Repo]:
    """Those of the hub that a page names."""
    return {name: make() for name, make in MODELS.items() if name in text}
