"""Where the real data sets are that tests and benchmarks read."""

from __future__ import annotations

import os
from pathlib import Path


def data_dir() -> Path:
    """The folder in the environment variable LOTTALORA_DATA, or `../shared/data` beside the repository.

    Raises:
        FileNotFoundError: it is not there; these tests need real data, so they fail rather than being skipped.
    """
    folder = Path(os.environ.get("LOTTALORA_DATA") or Path(__file__).parents[3] / "shared" / "data").resolve()
    if not (folder / "glue").is_dir():
        raise FileNotFoundError(
            f"No data sets in {folder}. Set LOTTALORA_DATA to a folder with glue/<task>/{{train,validation}}.parquet "
            "and tokenizers/bert-base-uncased/vocab.txt."
        )
    return folder
