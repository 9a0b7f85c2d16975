"""For `fuzz.py`: what can be wrong with the files of an artifact, besides what `fuzz_weights` does to the tensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import fuzz_json
from fuzz_weights import ADAPTER, ARCHITECTURE, MANIFEST, MUTATIONS, WEIGHTS, Mutation, Place, Weights

from hf_lottalora.plan.canonical import canonical_json, digest_of

# ---- the manifest and the two JSON files -------------------------------------------------------------------------------


def _manifest(what: str) -> Mutation:
    def mutate(rng: Random, place: Place) -> str:
        weights = Weights(place.folder / WEIGHTS)
        text = weights.data[MANIFEST].decode()
        if what == "bytes":
            data, said = fuzz_json.bytes_of(rng, text)
        else:
            edited, said = fuzz_json.edited(rng, what, text)
            data = edited.encode()
        weights.put(MANIFEST, data, shape=[len(data)])
        weights.write()
        return said

    return mutate


def _signed(rng: Random, place: Place) -> str:
    """What it says of the forms of tensors, spoilt, with digests that add up."""
    weights = Weights(place.folder / WEIGHTS)
    content = json.loads(weights.data[MANIFEST])
    stored = content.get("stored")
    wrong = rng.choice(["x", ["x"], {"x": 1}])
    if stored is None:
        said, content["stored"] = "added", wrong
    else:
        path = fuzz_json.pick(rng, stored)
        owner = fuzz_json.at(stored, path)
        said = f"{'.'.join(path)} {'deleted' if rng.random() < 0.5 else f'= {wrong}'}"
        if said.endswith("deleted"):
            del owner[path[-1]]
        else:
            owner[path[-1]] = wrong
    content["artifact"] = digest_of({key: value for key, value in content.items() if key != "artifact"})
    data = canonical_json(content)
    weights.put(MANIFEST, data, shape=[len(data)])
    weights.write()
    return said


def _json(name: str, what: str) -> Mutation:
    def mutate(rng: Random, place: Place) -> str:
        file = place.folder / name
        text = file.read_text()
        if what in fuzz_json.EDITS:
            edited, said = fuzz_json.edited(rng, what, text)
            file.write_text(edited)
            return said
        data, said = {"duplicated key": fuzz_json.duplicated, "deep": fuzz_json.nested, "bytes": fuzz_json.bytes_of}[
            what
        ](rng, text)
        file.write_bytes(data)
        return said

    return mutate


def _chosen(name: str) -> Mutation:
    def mutate(rng: Random, place: Place) -> str:
        file = place.folder / name
        content = json.loads(file.read_text())
        changes = [(key, value) for key, value in fuzz_json.CHOSEN[name] if content.get(key, ...) != value]
        # Half of the time a key that is there, which not every sort of artifact has.
        known = [change for change in changes if change[0] in content]
        key, value = rng.choice(known if known and rng.random() < 0.5 else changes)
        file.write_text(json.dumps({**content, key: value}))
        (place.folder / "evil.py").write_text(f"open({str(place.ran)!r}, 'w')\nclass Evil: pass\n")
        return f"{key}: {str(content.get(key, 'none'))[:40]} -> {str(value)[:60]}"

    return mutate


for _what in (*fuzz_json.EDITS, "bytes"):
    MUTATIONS[f"manifest: {_what}"] = _manifest(_what)
MUTATIONS["manifest: forms of tensors, signed anew"] = _signed
for _name in (ADAPTER, ARCHITECTURE):
    for _what in (*fuzz_json.EDITS, "duplicated key", "deep", "bytes"):
        MUTATIONS[f"{_name}: {_what}"] = _json(_name, _what)
    MUTATIONS[f"{_name}: chosen value"] = _chosen(_name)


# ---- files ------------------------------------------------------------------------------------------------------------


def _elsewhere(place: Place, name: str) -> Path:
    moved = place.folder.parent / name
    shutil.move(place.folder / name, moved)
    return moved


def _sparse(place: Place, name: str) -> None:
    os.truncate(place.folder / name, 1 << 36)


def _instead(make: Callable[[Path], Any]) -> Callable[[Place, str], None]:
    def replace(place: Place, name: str) -> None:
        (place.folder / name).unlink()
        make(place.folder / name)

    return replace


KINDS: dict[str, Callable[[Place, str], Any]] = {
    "a pipe": _instead(os.mkfifo),
    "a directory": _instead(Path.mkdir),
    "a link to a copy elsewhere": lambda place, name: (place.folder / name).symlink_to(_elsewhere(place, name)),
    "a link to itself": _instead(lambda file: file.symlink_to(file)),
    "a link to nothing": _instead(lambda file: file.symlink_to("no such file")),
    "a link to endless zeros": _instead(lambda file: file.symlink_to("/dev/zero")),
    "unreadable": lambda place, name: (place.folder / name).chmod(0),
    "missing": _instead(lambda file: None),
    "empty": lambda place, name: (place.folder / name).write_bytes(b""),
    "64 GiB": _sparse,
}


def _kind(what: str) -> Mutation:
    def mutate(rng: Random, place: Place) -> str:
        name = rng.choice(place.files())
        KINDS[what](place, name)
        return name

    return mutate


for _what in KINDS:
    MUTATIONS[f"file: {_what}"] = _kind(_what)


def _mixed(source: str, count: int, link: bool = False) -> Mutation:
    def mutate(rng: Random, place: Place) -> str:
        other: Path = getattr(place, source)
        both = [name for name in place.files() if (other / name).exists()]
        names = rng.sample(both, min(count, len(both)))
        for name in names:
            (place.folder / name).unlink()
            if link:
                (place.folder / name).symlink_to(other / name)
            else:
                shutil.copy(other / name, place.folder / name)
        return f"{' and '.join(names)} of {other.parent.name}"

    return mutate


MUTATIONS["mixed: one file of the twin"] = _mixed("twin", 1)
MUTATIONS["mixed: two files of the twin"] = _mixed("twin", 2)
MUTATIONS["mixed: a link to the twin's file"] = _mixed("twin", 1, link=True)
MUTATIONS["mixed: one file of another sort"] = _mixed("foreign", 1)
