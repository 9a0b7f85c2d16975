"""Reads what an artifact's files say, whoever wrote them: its JSON files, and the header and manifest of its weights.

A file is an ordinary one of a sensible size; its JSON is an object without duplicate keys, NaN or deep nesting, and
each value has its type. Whatever is not so is an `ArtifactError`, before anything else of the file is used.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..config import LottaLoraConfig
from ..options import check_types
from ..plan.plan import MANIFEST_KEY

MAX_BYTES = 64 * 2**20  # digests of some hundred thousand tensors; a header of safetensors may have 100 MB
MAX_DEPTH = 64
_AGAIN = "Get the file again from where it came, or save the artifact again."

# Those of safetensors that torch has.
_DTYPES = {
    *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "C64", "BOOL"),
    *("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"),
}
_MANIFEST: dict[str, Any] = {
    "format_version": int,
    "generator": str,
    "digest": str,
    "scaffold": dict[str, str],
    "kept": dict[str, str],
    "scaling": dict[str, float],
    "residual": bool,
    "rows": dict[str, list[int]],
    "trained": list[str],
    "class": str,
    "architecture": dict[str, Any] | None,
    "options": dict[str, Any],
    "tensors": dict[str, str] | None,
    "kept_bytes": dict[str, str],
    "stored": dict[str, Any],
    "artifact": str,
}
# What save_pretrained writes, and what it leaves out but an older version or PEFT may have written.
_FIELDS = {field.name for field in dataclasses.fields(LottaLoraConfig)} - {"runtime_config"}


class ArtifactError(ValueError):
    """A file of an artifact that cannot be used: which, where in it, what was expected and found, and what to do."""


def check_file(file: str | os.PathLike[str], root: str | os.PathLike[str]) -> str:
    """Refuse what is no ordinary file, or a symbolic link out of the artifact.

    Args:
        file: its path.
        root: the artifact's folder. In the hub's cache links lead from `snapshots/<revision>` to `blobs` beside it, and
            from there, in newer versions, to one `blobs` for all repositories.

    Returns:
        The path.

    Raises:
        ArtifactError: it is one.
    """
    _refuse_what_is_not_a_file(file)
    target, folder = Path(file).resolve(), Path(root).resolve()
    allowed = [folder]
    for repository in (place.parent for place in (folder, *folder.parents) if place.name == "snapshots"):
        blobs = (repository / "blobs", repository.parent / "blobs")
        allowed += [place for place in blobs if not place.is_symlink()]
    if not any(target.is_relative_to(place) for place in allowed):
        raise ArtifactError(
            f"{file}: expected a file within {root}, found a symbolic link to {target}. If that is the file you mean, "
            "put a copy of it in the link's place."
        )
    return str(file)


def _refuse_what_is_not_a_file(file: str | os.PathLike[str]) -> None:
    try:
        mode = os.stat(file).st_mode
    except OSError as error:
        raise ArtifactError(f"{file}: expected a file, found none that can be read ({error.strerror}).") from error
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    if not stat.S_ISREG(mode):
        found = kinds.get(stat.S_IFMT(mode), "a device")
        raise ArtifactError(f"{file}: expected an ordinary file, found {found}. {_AGAIN}")


def _read(file: str | os.PathLike[str]) -> bytes:
    _refuse_what_is_not_a_file(file)
    try:
        with Path(file).open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{file}: expected a file that can be read, found {error.strerror}.") from error
    if len(data) > MAX_BYTES:
        raise ArtifactError(f"{file}: expected at most {MAX_BYTES // 2**20} MiB, found more. {_AGAIN}")
    return data


def read_json(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ArtifactError: it is none, or contains what no writer of ours writes.
    """
    return parse(_read(file), str(file))


def parse(data: bytes, where: str) -> dict[str, Any]:
    """The object that this is the JSON of.

    Args:
        data: UTF-8.
        where: what is read, the beginning of errors.

    Raises:
        ArtifactError: it is damaged, no object, nested too deeply, or has a key twice, NaN or an infinity.
    """

    def refuse(problem: str) -> NoReturn:
        raise ArtifactError(f"{where}: expected JSON as save_pretrained writes it, found {problem}. {_AGAIN}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                refuse(f"the key {key!r} twice")
            # The artifacts of many adapters over one scaffold say mostly the same: it is kept once.
            found[sys.intern(key)] = sys.intern(value) if isinstance(value, str) else value
        return found

    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _is_deep(data):
        refuse(f"more than {MAX_DEPTH} levels of nesting")
    try:
        text = data.decode("utf-8")
        content = json.loads(text, object_pairs_hook=unique, parse_constant=lambda name: refuse(f"the number {name}"))
    except ArtifactError:
        raise
    except UnicodeDecodeError as error:
        refuse(f"what is not UTF-8 (byte {error.start})")
    except ValueError as error:
        refuse(f"what is damaged ({error})")
    if not isinstance(content, dict):
        refuse(f"a {type(content).__name__} instead of an object")
    return content


def _is_deep(data: bytes) -> bool:
    """Whether brackets are nested more than `MAX_DEPTH` deep, those in strings apart."""
    depth = 0
    for match in re.finditer(rb'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]', data, flags=re.DOTALL):
        first = match[0][:1]
        depth += (first in b"[{") - (first in b"]}")
        if depth > MAX_DEPTH:
            return True
    return False


# ---- adapter_config.json ---------------------------------------------------------------------------------------------


def read_adapter_config(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of an `adapter_config.json`, from which a `LottaLoraConfig` can be made; or those of a plain adapter.

    Raises:
        ArtifactError: a field is unknown or does not fit, or the file names another method than its weights.
    """
    content = read_json(file)
    method = content.get("peft_type")
    if method != "LOTTALORA":
        if isinstance(method, str) and method in PEFT_TYPE_TO_CONFIG_MAPPING and not is_ours(file):
            return content
        raise ArtifactError(
            f"{file}: peft_type: expected 'LOTTALORA', found {method!r}. Another method would draw no scaffold under "
            f"these adapters. {_AGAIN}"
        )
    fields = {key: value for key, value in content.items() if key in _FIELDS}
    for key in sorted(content.keys() - _FIELDS):
        if content[key] is None or content[key] is False or content[key] in ("", [], {}):
            continue  # of a newer PEFT, switched off
        near = difflib.get_close_matches(key, _FIELDS, n=1)
        meant = (
            f"Did you mean {near[0]!r}?" if near else "If a newer version wrote it: pip install -U peft hf-lottalora"
        )
        raise ArtifactError(f"{file}: {key}: expected a field of LottaLoraConfig, found {content[key]!r:.80}. {meant}")
    try:
        LottaLoraConfig(**fields)
    except Exception as error:  # whatever a value of the file leads to
        raise ArtifactError(f"{file}: {error}") from error
    return fields


def is_ours(file: str | os.PathLike[str]) -> bool:
    """Whether an `adapter_config.json` is that of a LottaLoRA artifact: by what it or the weights beside it say."""
    try:
        data = _read(file)
        if b'"LOTTALORA"' in data or b'"lottalora_version"' in data:
            return True
        return f'"{MANIFEST_KEY}"'.encode() in _header(Path(file).parent / SAFETENSORS_WEIGHTS_NAME)
    except ArtifactError:
        return False


# ---- adapter_model.safetensors ---------------------------------------------------------------------------------------


def _header(file: str | os.PathLike[str]) -> bytes:
    _refuse_what_is_not_a_file(file)
    try:
        with Path(file).open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = opened.read(size) if size <= MAX_BYTES else b""
    except OSError as error:
        raise ArtifactError(f"{file}: expected a file that can be read, found {error.strerror}.") from error
    if len(header) != size or not size:
        raise ArtifactError(
            f"{file} is not a readable safetensors file; it may be truncated: expected a header of {size} bytes, found "
            f"{len(header)}. {_AGAIN}"
        )
    return header


def read_weights_header(file: str) -> tuple[dict[str, tuple[int, ...]], torch.Tensor | None]:
    """Shapes by key of a safetensors file, and the manifest in it, shape `(n,)`, uint8; None where there is none.

    Raises:
        ArtifactError: the file is damaged or cut off, or the manifest in it is.
    """
    header = _header(file)
    entries = parse(header, f"{file}: header")
    for key, entry in entries.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if key != "__metadata__" and dtype not in _DTYPES:
            raise ArtifactError(f"{file}: header: {key}: expected a dtype of torch, found {dtype!r}. {_AGAIN}")
    offsets = [entry.get("data_offsets") for key, entry in entries.items() if key != "__metadata__"]
    ends = [pair[1] for pair in offsets if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int)]
    size, found = 8 + len(header) + max(ends, default=0), os.path.getsize(file)
    if found != size:  # before that much is mapped into memory
        raise ArtifactError(
            f"{file} is not a readable safetensors file; it may be truncated: expected {size} bytes, found {found}. "
            f"{_AGAIN}"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
            manifest = None
            if MANIFEST_KEY in shapes:
                dtype, shape = entries[MANIFEST_KEY]["dtype"], shapes[MANIFEST_KEY]
                if dtype != "U8" or len(shape) != 1 or shape[0] > MAX_BYTES:
                    raise ArtifactError(
                        f"{file}: {MANIFEST_KEY}: expected U8 of shape (n,), found {dtype} of {shape}. {_AGAIN}"
                    )
                manifest = opened.get_tensor(MANIFEST_KEY)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} is not a readable safetensors file; it may be truncated ({error}).") from error
    if manifest is not None:
        where = f"{file} has a damaged {MANIFEST_KEY!r}"
        content = parse(manifest.numpy().tobytes(), where)
        try:
            check_types({key: content[key] for key in _MANIFEST.keys() & content.keys()}, _MANIFEST)
        except ValueError as error:
            raise ArtifactError(f"{where}: {error} {_AGAIN}") from error
    return shapes, manifest
