"""Arguments and options that several commands have."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated  # typer 0.24 reads annotations at run time

import typer

ARTIFACT = "Folder that save_pretrained has written, or a repository on the hub such as user/name."


# What follows is checked before the package, and torch, are imported; they check it for their own callers.


def _digest(given: str | None) -> str | None:
    if given is not None and re.fullmatch("[0-9a-f]{64}", given) is None:
        raise typer.BadParameter("A digest has 64 hexadecimal digits, in lower case; the card and inspect show it.")
    return given


Artifact = Annotated[str, typer.Argument(help=ARTIFACT, show_default=False)]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document to standard output, all else to the other.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Write into a folder that has files; those in the way are replaced.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)]
Subfolder = Annotated[
    str | None, typer.Option(help="Folder within the first one or the repository.", show_default=False)
]
Token = Annotated[
    str | None, typer.Option(help="For the hub; default: that of `hf auth login` or HF_TOKEN.", show_default=False)
]
Expect = Annotated[
    str | None,
    typer.Option(help="Digest that the artifact should have.", metavar="DIGEST", show_default=False, callback=_digest),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        help="Pretrained base model, of an artifact that keeps its weights: a name or path.", show_default=False
    ),
]
NamedBase = Annotated[bool, typer.Option("--named-base", help="Fetch the base model that the artifact names.")]


class Form(StrEnum):
    """What `lottalora export` writes."""

    DENSE = "dense"
    LORA = "lora"


class Residency(StrEnum):
    """How a scaffold is held."""

    DENSE = "dense"
    PACKED = "packed"
    INT4 = "int4"
    STREAMED = "streamed"


class DtypeName(StrEnum):
    """Of a model."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"


Dtype = Annotated[DtypeName | None, typer.Option(help="Default: that of the artifact.", show_default=False)]


def _size(given: str) -> str:
    if re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)? ?[KMGT]B", given, re.IGNORECASE) is None:
        raise typer.BadParameter("Expected a number above 0 with KB, MB, GB or TB behind it.")
    return given


ShardSize = Annotated[str, typer.Option(help="Of one file of weights.", callback=_size)]


def base_of(name: str | None, named: bool) -> str | bool | None:
    """The two options about the base model as one argument of our loaders."""
    if name is not None and named:
        raise typer.BadParameter("Pass --base-model or --named-base, not both.")
    return True if named else name
