"""Rows from the hub or from your own files, with a part of them to evaluate on: what the data of every task share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from arguments import UsageError
from datasets import Dataset, IterableDataset, load_dataset

READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
Rows = Dataset | IterableDataset


def _kind(file: str) -> str:
    return Path(file.removesuffix(".gz")).suffix


def check_file(file: str, readers: Mapping[str, str]) -> None:
    """Raise `UsageError` unless the file is there and of a kind that `readers` has."""
    if _kind(file) not in readers:
        raise UsageError(f"{file}: unknown kind of file, expected one of {', '.join(readers)}.")
    if not Path(file).is_file():
        raise UsageError(f"{file}: no such file.")


def read_file(file: str, readers: Mapping[str, str] = READERS, **options: Any) -> Any:
    """The rows of a file, by the reader of `datasets` for its kind. `options` are those of `load_dataset`."""
    with said_of(file):
        return load_dataset(readers[_kind(file)], data_files=file, split="train", **options)


@contextmanager
def said_of(source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # datasets, pyarrow, pandas and json raise errors of their own kinds
        raise UsageError(f"{source}: cannot be read, or has no rows: {error.__cause__ or error}") from error


@dataclass
class DataArguments:
    """Where the rows come from, and how many of them are used."""

    readers: ClassVar[Mapping[str, str]] = READERS
    in_order: ClassVar[bool] = False  # whether a part of the rows is the beginning, or drawn from all

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the hub, or a folder with one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which configuration of it."})
    train_file: str | None = field(default=None, metadata={"help": "Your own file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "The same to evaluate on."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Of the rows to train on, kept for evaluation where there are no others for it."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many only."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that prepare the data."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Prepare again even if a cached result exists."})

    def own(self) -> dict[str, str]:
        """Your own files by split."""
        files = {"train": self.train_file, "validation": self.validation_file}
        return {split: file for split, file in files.items() if file}

    def check(self, do_train: bool) -> None:
        """Raise `UsageError` for data that is missing, of an unknown kind or named twice."""
        own = self.own()
        if self.dataset_name and own:
            raise UsageError("Pass either --dataset_name or files of your own, not both.")
        if not self.dataset_name and not own:
            raise UsageError("Pass --dataset_name, or --train_file (and --validation_file to evaluate).")
        if own and do_train and "train" not in own:
            raise UsageError("--do_train needs --train_file too, since you pass files of your own.")
        for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, got {value}.")
        if not 0 < self.validation_split_percentage < 100:
            raise UsageError(
                f"--validation_split_percentage must be between 1 and 99, got {self.validation_split_percentage}."
            )
        for source in own.values():
            self.check_source(source)

    def check_source(self, source: str) -> None:
        check_file(source, self.readers)

    def read_source(self, source: str, **options: Any) -> Rows:
        return read_file(source, self.readers, **options)

    def load(self, do_train: bool, evaluate: bool, **options: Any) -> dict[str, Rows]:
        """The rows by split, "train" and "validation", as far as they are needed.

        Args:
            do_train: whether there must be rows to train on.
            evaluate: whether there must be rows to evaluate on; if there are none, a part of the others is kept.
            options: of `load_dataset`.
        """
        if self.dataset_name:
            with said_of(f"--dataset_name {self.dataset_name}"):
                sets = dict(load_dataset(self.dataset_name, self.dataset_config_name, **options))
            others = [name for name in ("validation", "valid", "test") if name in sets]
            sets = {"train": sets.get("train"), "validation": sets[others[0]] if others else None}
            sets = {split: rows for split, rows in sets.items() if rows is not None}
        else:
            sets = {split: self.read_source(source, **options) for split, source in self.own().items()}
        if (do_train or "validation" not in sets) and "train" not in sets:
            raise UsageError(f"--dataset_name {self.dataset_name}: no split 'train' there.")
        if evaluate and "validation" not in sets:
            sets = self._split(sets["train"])
        wanted = {"train": do_train, "validation": evaluate}
        return {split: rows for split, rows in sets.items() if wanted[split]}

    def _split(self, rows: Rows) -> dict[str, Rows]:
        if not isinstance(rows, Dataset):
            raise UsageError("A stream has no part to evaluate on. Pass --validation_file.")
        kept = -(-len(rows) * self.validation_split_percentage // 100)
        if kept >= len(rows):
            share = f"{self.validation_split_percentage} %"
            raise UsageError(f"Of {len(rows)} rows {share} are all of them. Pass --validation_file to evaluate.")
        if not self.in_order:
            sets = rows.train_test_split(kept, seed=0)  # whatever --seed: scores are of the same rows
            return {"train": sets["train"], "validation": sets["test"]}
        return {"train": rows.select(range(kept, len(rows))), "validation": rows.select(range(kept))}

    def first(self, split: str, rows: Rows) -> Rows:
        """As many rows as --max_train_samples or --max_eval_samples say: the first, or drawn from all."""
        limit = self.max_train_samples if split == "train" else self.max_eval_samples
        if limit is None:
            return rows
        if isinstance(rows, IterableDataset):
            return rows.take(limit)
        return (rows if self.in_order else rows.shuffle(seed=0)).select(range(min(limit, len(rows))))

    def map_options(self, rows: Rows, what: str) -> dict[str, Any]:
        """Options of `rows.map`, as far as a stream has them."""
        if isinstance(rows, IterableDataset):
            return {}
        use_cache = not self.overwrite_cache
        return {"num_proc": self.preprocessing_num_workers, "load_from_cache_file": use_cache, "desc": what}


@dataclass
class FolderArguments(DataArguments):
    """The same, or a folder that has a folder of files for each class."""

    train_dir: str | None = field(default=None, metadata={"help": "Folder with a folder for each class to train on."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same to evaluate on."})

    def own(self) -> dict[str, str]:
        folders = {"train": self.train_dir, "validation": self.validation_dir}
        return super().own() | {split: folder for split, folder in folders.items() if folder}

    def check(self, do_train: bool) -> None:
        super().check(do_train)
        if (self.train_dir and self.train_file) or (self.validation_dir and self.validation_file):
            raise UsageError("Pass either a folder or a file, not both: --train_dir or --train_file.")

    def check_source(self, source: str) -> None:
        if source not in (self.train_dir, self.validation_dir):
            super().check_source(source)
        elif not Path(source).is_dir():
            raise UsageError(f"{source}: no such folder.")

    def read_source(self, source: str, **options: Any) -> Rows:
        return self.read_folder(source, **options) if Path(source).is_dir() else super().read_source(source, **options)

    def read_folder(self, folder: str, **options: Any) -> Rows:
        """The files of a folder, with the names of their classes."""
        raise NotImplementedError
