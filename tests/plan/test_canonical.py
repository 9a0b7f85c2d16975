"""What the manifest says of a configuration, and of the `config.json` that lies beside it, for all model types."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import shrink
from transformers import PreTrainedConfig

from hf_lottalora.plan.canonical import canonical_json, describe, first_contradiction, first_edit, plain


def saved(folder: Path) -> Iterator[tuple[str, PreTrainedConfig, dict[str, Any], PreTrainedConfig]]:
    """Each model type that can be made, saved and read again: its name, its configuration, the file's, and that read."""
    for name in shrink.MODEL_TYPES:
        try:
            made = shrink.shrunk_config(name)
            copy.deepcopy(made).save_pretrained(folder)
            again = type(made).from_pretrained(folder)
        except Exception:  # no default without parts, or its own file is refused
            continue
        yield name, made, json.loads((folder / "config.json").read_text()), again


def edits(content: dict[str, Any], path: list[str]) -> Iterator[dict[str, Any]]:
    """The content with another value at a path, and with none."""
    for value in ("another", None):
        edited = copy.deepcopy(content)
        within = reduce(dict.__getitem__, path[:-1], edited)
        del within[path[-1]]
        if value:
            within[path[-1]] = value
        yield edited


@pytest.mark.smoke
def test_a_file_is_what_was_described_and_no_other(tmp_path: Path) -> None:
    """Also with infinite values, parts without a model type, and dots in keys."""
    wrong: dict[str, Any] = {}
    seen = 0
    for name, made, content, again in saved(tmp_path):
        seen += 1
        described = json.loads(canonical_json(describe(made)))
        refused = first_edit(described, content)
        if plain(again) == plain(made):  # some releases lose values by their own files
            refused = refused or first_contradiction(described, again)
        passed = [
            path for path in described["chosen"][:3] for e in edits(content, path) if not first_edit(described, e)
        ]
        if refused or passed:
            wrong[name] = refused, passed
    assert not wrong
    assert seen > 350
