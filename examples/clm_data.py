"""Data of `train_clm.py`: text from files or the hub, as blocks of tokens; and a tokenizer made of that text."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import data_files
from arguments import UsageError
from data_files import READERS, Rows
from datasets import Dataset, config
from tokenizers.implementations import ByteLevelBPETokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

END = "<|endoftext|>"
SMALLEST = len(ByteLevel.alphabet()) + 1  # every byte, and the end
# Of a batch's tokens what is left over is dropped, less than a block: of few rows that would be much of a text.
ROWS_AT_ONCE = 5_000


@dataclass
class DataArguments(data_files.DataArguments):
    """Which text: `--dataset_name` on the hub, or your own files; and into how long blocks it is cut.

    A text file (txt, one row a line), csv, json(l) or parquet, all as they are or with .gz. The text is in the column
    'text', or in the first one.
    """

    readers: ClassVar = {**READERS, ".txt": "text"}
    in_order: ClassVar = True

    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens of a training example. Default: 1,024, or as many as tokenizer and model take."},
    )
    train_tokenizer: int | None = field(
        default=None,
        metadata={
            "help": "Make a byte-level BPE of so many tokens of the text to train on, such as 32000, in place of "
            "--tokenizer_name. It is kept in the cache, by text and size."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read while training, rather than preparing all first. Needs --max_steps."}
    )
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep the line breaks of text files."})

    def check(self, do_train: bool) -> None:
        super().check(do_train)
        if self.block_size is not None and self.block_size < 2:
            raise UsageError(
                f"--block_size must be at least 2, got {self.block_size}: a token is predicted from others."
            )
        if self.train_tokenizer is None:
            return
        if self.train_tokenizer < SMALLEST:
            raise UsageError(
                f"--train_tokenizer must be at least {SMALLEST}, every byte and the end of a text, got "
                f"{self.train_tokenizer}."
            )
        if self.streaming:
            raise UsageError("--train_tokenizer reads all of the text, which --streaming is not to do. Pass one alone.")
        if not do_train:
            raise UsageError("--train_tokenizer is for --do_train: a trained model has its own.")

    def read_source(self, source: str, **options: Any) -> Rows:
        if self.readers[Path(source.removesuffix(".gz")).suffix] == "text":
            options["keep_linebreaks"] = self.keep_linebreaks
        return super().read_source(source, **options)

    def blocks(self, split: str, rows: Rows, tokenizer: PreTrainedTokenizerBase, length: int) -> Rows:
        """`rows` as blocks of `length` tokens, one text after the other; as many of them as --max_..._samples say."""
        column = text_column(split, rows)

        def pack(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
            texts = batch[column]
            if None in texts:
                row = numbers[texts.index(None)]
                raise UsageError(f"{split}: column {column!r}: a text in each row expected, found none in row {row}.")
            ids = list(chain.from_iterable(tokenizer(texts, verbose=False)["input_ids"]))
            blocks = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
            return {"input_ids": blocks, "labels": blocks}

        options = {"batched": True, "batch_size": ROWS_AT_ONCE, "with_indices": True}
        options["remove_columns"] = list(next(iter(rows)))
        packed = rows.map(pack, **options, **self.map_options(rows, f"tokenising {split}"))
        if next(iter(packed), None) is None:
            raise UsageError(
                f"{split}: the text is shorter than a block of {length} tokens. Pass more, or a smaller --block_size."
            )
        return self.first(split, packed)


def text_column(split: str, rows: Rows) -> str:
    """The column 'text', or the first one."""
    row = next(iter(rows), None)
    if row is None:
        raise UsageError(f"{split}: there is no row.")
    column = "text" if "text" in row else next(iter(row))
    if not isinstance(row[column], str | None):
        raise UsageError(f"{split}: column {column!r}: text expected, found {type(row[column]).__name__}.")
    return column


def trained_tokenizer(rows: Dataset, size: int, cache_dir: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` tokens of these texts. Made once for a text and a size, and kept in the cache."""
    column = text_column("train", rows)

    def texts() -> Iterator[str]:
        for batch in rows.iter(batch_size=1_000):
            yield from (text or "" for text in batch[column])

    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    for text in texts():
        digest.update(len(text).to_bytes(8, "little") + text.encode())
    file = Path(cache_dir or config.HF_DATASETS_CACHE) / "byte_level_bpe" / f"{digest.hexdigest()}.json"
    if not file.exists():
        logger.info("Training a tokenizer of %d tokens.", size)
        model = ByteLevelBPETokenizer()
        model.train_from_iterator(texts(), vocab_size=size, special_tokens=[END], show_progress=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")  # never half a file under its name
        model.save(str(partial))
        os.replace(partial, file)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=END, eos_token=END)
    if len(tokenizer) < size:
        logger.warning("The tokenizer has %d tokens, not %d: there is too little text.", len(tokenizer), size)
    return tokenizer
