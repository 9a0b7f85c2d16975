"""What a user has put beside an artifact for a model's inputs and outputs: tokenizer, processor, generation config."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from .reader import check_file

# As transformers and tokenizers call their files. None of an artifact's own, and no code.
PATTERNS = (
    "tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "*spiece.model", "sentencepiece*.model", "*.tiktoken", "chat_template*", "*processor_config.json",
    "generation_config.json",
)  # fmt: skip


def companions(path: str | os.PathLike[str], subfolder: str | None = None, **hub: Any) -> list[Path]:
    """Local paths of these files beside an artifact, which has been read already.

    Args:
        path: its folder, or its repository on the hub.
        subfolder: of that.
        hub: options of the hub, with the commit that it was read from as `revision`.

    Raises:
        ArtifactError: one is no ordinary file, or a symbolic link out of the folder.
    """
    if not Path(path).is_dir():
        prefix = f"{subfolder}/" if subfolder else ""
        path = snapshot_download(str(path), allow_patterns=[prefix + pattern for pattern in PATTERNS], **hub)
    folder = Path(path, subfolder or "")
    found = sorted({file for pattern in PATTERNS for file in folder.glob(pattern)})
    return [Path(check_file(file, folder)) for file in found]
