"""For `fuzz.py`: what can be wrong with `adapter_model.safetensors`, and the list of all that can be wrong."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import fuzz_json
import torch

WEIGHTS, ADAPTER, ARCHITECTURE = "adapter_model.safetensors", "adapter_config.json", "config.json"
FILES = (WEIGHTS, ADAPTER, ARCHITECTURE)
MANIFEST = "lottalora_manifest"
SIZE = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class Place(NamedTuple):
    """A copy of an artifact that may be spoilt, in a folder of its own, and two others."""

    folder: Path
    twin: Path
    foreign: Path

    @property
    def ran(self) -> Path:
        """Where code in the artifact says that it was run."""
        return self.folder.parent / "RAN"

    def files(self) -> list[str]:
        return [name for name in FILES if (self.folder / name).exists()]


Mutation = Callable[[Random, Place], str]
MUTATIONS: dict[str, Mutation] = {}


def mutation(name: str) -> Callable[[Mutation], Mutation]:
    """Put a function, which spoils the folder and says how, into the list."""

    def add(function: Mutation) -> Mutation:
        MUTATIONS[name] = function
        return function

    return add


# ---- adapter_model.safetensors ----------------------------------------------------------------------------------------


class Weights:
    """A safetensors file as it lies on disk: each tensor's dtype, shape and bytes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        self.header: dict[str, Any] = json.loads(raw[8 : 8 + length])
        self.meta = self.header.pop("__metadata__", None)
        start = 8 + length
        self.data = {
            k: raw[start + v["data_offsets"][0] : start + v["data_offsets"][1]] for k, v in self.header.items()
        }

    def names(self) -> list[str]:
        return sorted(name for name in self.header if name != MANIFEST)

    def put(self, name: str, data: bytes, dtype: str | None = None, shape: list[int] | None = None) -> None:
        old = self.header.get(name, {})
        self.header[name] = {"dtype": dtype or old["dtype"], "shape": old["shape"] if shape is None else shape}
        self.data[name] = data

    def pop(self, name: str) -> tuple[bytes, str, list[int]]:
        entry = self.header.pop(name)
        return self.data.pop(name), entry["dtype"], entry["shape"]

    def write(self, header: Callable[[dict[str, Any]], Any] = lambda header: None) -> None:
        """Write it, with the offsets that follow; `header` may change the finished header, or return its text."""
        end, entries = 0, {}
        for name, entry in self.header.items():
            begin, end = end, end + len(self.data[name])
            entries[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [begin, end]}
        whole = {"__metadata__": self.meta, **entries} if self.meta else entries
        text = header(whole) or json.dumps(whole)
        encoded = text.encode()
        encoded += b" " * (-len(encoded) % 8)
        self.file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"".join(self.data.values()))


def _weights(place: Place) -> Weights:
    return Weights(place.folder / WEIGHTS)


def _flipped(rng: Random, data: bytes) -> tuple[bytes, int]:
    bit = rng.randrange(8 * len(data))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed), bit


@mutation("weights: bit in a tensor")
def _(rng: Random, place: Place) -> str:
    weights = _weights(place)
    name = rng.choice(weights.names())
    data, bit = _flipped(rng, weights.data[name])
    weights.put(name, data)
    weights.write()
    return f"bit {bit} of {name}"


@mutation("weights: bit in the manifest")
def _(rng: Random, place: Place) -> str:
    weights = _weights(place)
    data, bit = _flipped(rng, weights.data[MANIFEST])
    weights.put(MANIFEST, data)
    weights.write()
    return f"bit {bit}"


@mutation("weights: bit in the header")
def _(rng: Random, place: Place) -> str:
    file = place.folder / WEIGHTS
    raw = file.read_bytes()
    length = 8 + struct.unpack("<Q", raw[:8])[0]
    data, bit = _flipped(rng, raw[:length])
    file.write_bytes(data + raw[length:])
    return f"bit {bit}"


@mutation("weights: odd number")
def _(rng: Random, place: Place) -> str:
    weights = _weights(place)
    name = rng.choice(weights.names())
    dtype = DTYPES.get(weights.header[name]["dtype"], torch.uint8)
    values = torch.frombuffer(bytearray(weights.data[name]), dtype=dtype)
    value = rng.choice([float("nan"), float("inf"), float("-inf"), 1e4, 1e-7]) if dtype.is_floating_point else 3
    where = rng.randrange(len(values))
    values[where] = value
    weights.put(name, values.view(torch.uint8).numpy().tobytes())
    weights.write()
    return f"{name}[{where}] = {value}"


def _two_alike(rng: Random, weights: Weights) -> tuple[str, str]:
    names = weights.names()
    alike = [
        (a, b) for a in names for b in names
        if a < b and weights.header[a]["shape"] == weights.header[b]["shape"] and weights.data[a] != weights.data[b]
    ]  # fmt: skip
    return rng.choice(alike)


@mutation("weights: two tensors swapped")
def _(rng: Random, place: Place) -> str:
    weights = _weights(place)
    a, b = _two_alike(rng, weights)
    weights.data[a], weights.data[b] = weights.data[b], weights.data[a]
    weights.write()
    return f"{a} and {b}"


@mutation("weights: other dtype in the header")
def _(rng: Random, place: Place) -> str:
    weights = _weights(place)
    name = rng.choice([*weights.names(), MANIFEST])
    was = weights.header[name]["dtype"]
    alike = [dtype for dtype, size in SIZE.items() if size == SIZE[was] and dtype != was]
    found = rng.choice(alike if rng.random() < 0.7 else ["F64", "U8", "F4", "no such"])
    weights.header[name]["dtype"] = found
    weights.write()
    return f"{name}: {was} -> {found}"


@mutation("weights: cast")
def _(rng: Random, place: Place) -> str:
    weights = _weights(place)
    names = [name for name in weights.names() if weights.header[name]["dtype"] in DTYPES]
    to = rng.choice(list(DTYPES))
    some = [rng.choice(names)] if rng.random() < 0.5 else names
    some = [name for name in some if weights.header[name]["dtype"] != to] or names
    for name in some:
        was = weights.header[name]["dtype"]
        to = to if to != was else "F64"
        values = torch.frombuffer(bytearray(weights.data[name]), dtype=DTYPES[was]).to(DTYPES[to])
        weights.put(name, values.view(torch.uint8).numpy().tobytes(), to)
    weights.write()
    return f"{some[0]}{' and all others' if len(some) > 1 else ''} to {to}"


@mutation("weights: renamed, missing or added")
def _(rng: Random, place: Place) -> str:
    weights = _weights(place)
    name = rng.choice([*weights.names(), MANIFEST])
    what = rng.choice(["renamed", "missing", "added", "base_layer added"])
    if what == "added":
        weights.put(rng.choice([name + "x", "x", "", name.upper()]), *weights.pop(name))
        weights = Weights(place.folder / WEIGHTS)
        weights.put(name + "x", weights.data[name], weights.header[name]["dtype"], weights.header[name]["shape"])
    elif what == "base_layer added":
        stem = next(name for name in weights.names() if name.endswith("lora_A.weight")).removesuffix("lora_A.weight")
        weights.put(f"{stem}base_layer.weight", bytes(4), "F32", [1])
    else:
        entry = weights.pop(name)
        if what == "renamed":
            new = rng.choice([name.removeprefix("base_model.model."), name + ".default", name.replace("_", "-")])
            weights.put(new if new != name else name + "x", *entry)
    weights.write()
    return f"{name} {what}"


@mutation("weights: other shape")
def _(rng: Random, place: Place) -> str:
    weights = _weights(place)
    name = rng.choice(weights.names())
    shape = weights.header[name]["shape"]
    new = rng.choice([shape[::-1], [*shape, 1], [1, *shape], [torch.Size(shape).numel()], [], [0], [2**40, 2**40]])
    new = new if new != shape else [*shape, 1]
    weights.header[name]["shape"] = new
    weights.write()
    return f"{name}: {shape} -> {new}"


@mutation("weights: a tensor of the twin's")
def _(rng: Random, place: Place) -> str:
    weights, other = _weights(place), Weights(place.twin / WEIGHTS)
    name = rng.choice([name for name in weights.names() if weights.data[name] != other.data[name]])
    weights.data[name] = other.data[name]
    weights.write()
    return name


@mutation("weights: length")
def _(rng: Random, place: Place) -> str:
    file = place.folder / WEIGHTS
    raw = file.read_bytes()
    at = rng.randrange(len(raw))
    what = rng.choice(["cut", "cut", "longer", "empty", "8 bytes"])
    file.write_bytes({"cut": raw[:at], "longer": raw + bytes(at), "empty": b"", "8 bytes": raw[:8]}[what])
    return f"{what} at {at} of {len(raw)}"


@mutation("weights: header edited")
def _(rng: Random, place: Place) -> str:
    weights = _weights(place)
    name = rng.choice(weights.names())
    what = rng.choice(["metadata", "offsets", "not JSON", "twice", "key deleted", "same type", "other type", "deep"])

    def edit(header: dict[str, Any]) -> str | None:
        if what == "metadata":
            header["__metadata__"] = rng.choice([{"format": "tf"}, {"format": "pt", "x": "y"}, {"x": 1}, [], {}])
        elif what == "offsets":
            header[name]["data_offsets"] = rng.choice(
                [[0, 4], [-4, 0], [8, 4], [0, 2**63], [0.5, 1], header[name]["data_offsets"][:1]]
            )
        elif what == "not JSON":
            return json.dumps(header)[:-2]
        elif what == "twice":
            return f"{json.dumps(header)[:-1]}, {json.dumps(name)}: {json.dumps(header[weights.names()[0]])}}}"
        elif what == "deep":
            return f'{json.dumps(header)[:-1]}, "x": {"[" * 50_000}{"]" * 50_000}}}'
        else:
            return fuzz_json.edited(rng, what, json.dumps(header))[0]
        return None

    weights.write(edit)
    return f"{what} of {name}"


@mutation("weights: a pickle instead")
def _(rng: Random, place: Place) -> str:
    class Code:
        def __reduce__(self) -> Any:
            return open, (str(place.ran), "w")

    (place.folder / "adapter_model.bin").write_bytes(pickle.dumps(Code()))
    beside = rng.random() < 0.3
    if not beside:
        (place.folder / WEIGHTS).unlink()
    return "beside them" if beside else "alone"
