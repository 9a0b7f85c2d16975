"""SHA-256 of an artifact's tensors: name, dtype, shape and every byte; in parallel, large ones in pieces."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_PIECE = 1 << 22  # bytes
_AT_ONCE = 64  # pieces: what is not in memory yet is read or copied as the hashing goes on
_SHOWN = 8  # hexadecimal digits of each tensor's own digest that are kept, to name the one that differs


def tensor_digests(keys: Iterable[str], tensor_of: Callable[[str], torch.Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor, as 64 hexadecimal digits: of its key, dtype and shape, and of the SHA-256 of each 4 MiB.

    Args:
        keys: names of the tensors.
        tensor_of: gives a tensor, on any device.
    """

    def pieces(key: str) -> tuple[str, list[Any]]:
        tensor = tensor_of(key)
        data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        head = f"{key} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n"
        return head, [pool.submit(hashlib.sha256, data[at : at + _PIECE]) for at in range(0, len(data), _PIECE)]

    def finish(key: str) -> None:
        head, parts = waiting.pop(key)
        digest = hashlib.sha256(head.encode() + b"".join(piece.result().digest() for piece in parts))
        digests[key] = digest.hexdigest()

    waiting: dict[str, tuple[str, list[Any]]] = {}
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        for key in sorted(keys):
            waiting[key] = pieces(key)
            while sum(len(parts) for _, parts in waiting.values()) > _AT_ONCE:
                finish(next(iter(waiting)))
        for key in list(waiting):
            finish(key)
    return digests


def check_digest(digest: str) -> None:
    """Whether it could be that of an artifact.

    Raises:
        ValueError: it could not, such as a part of one.
    """
    if not isinstance(digest, str) or re.fullmatch("[0-9a-f]{64}", digest) is None:
        raise ValueError(
            "digest must be the 64 hexadecimal digits, in lower case, that the model card and `lottalora inspect` show "
            f"as digest, got {digest!r}."
        )


def digests_one_by_one(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """The same for tensors that are in memory one at a time, while the next one is asked for."""
    digests: dict[str, str] = {}
    for key, tensor in tensors:
        digests |= tensor_digests([key], {key: tensor}.__getitem__)
    return digests


def summed_up(digests: Mapping[str, str]) -> dict[str, str]:
    """One SHA-256 over the digests in the order of their keys, and the first digits of each one."""
    ordered = [digests[key] for key in sorted(digests)]
    whole = hashlib.sha256("".join(ordered).encode()).hexdigest()
    return {"digest": whole, "each": "".join(digest[:_SHOWN] for digest in ordered)}


def number_of(recorded: Mapping[str, str]) -> int:
    """How many tensors were summed up."""
    return len(recorded["each"]) // _SHOWN


def differing(recorded: Mapping[str, str], digests: Mapping[str, str]) -> str | None:
    """The first key whose tensor is not the recorded one, None where all are."""
    if summed_up(digests)["digest"] == recorded["digest"]:
        return None
    for at, key in enumerate(sorted(digests)):
        if recorded["each"][at * _SHOWN :][:_SHOWN] != digests[key][:_SHOWN]:
            return key
    return next(iter(sorted(digests)), "")
