"""The commands of `lottalora`. Each imports what it does when it runs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Artifact,
    BaseModel,
    Dtype,
    DtypeName,
    Expect,
    Force,
    Form,
    Json,
    NamedBase,
    Residency,
    Revision,
    ShardSize,
    Subfolder,
    Token,
    base_of,
)
from .reporting import MEANINGS, finish, reporting

_CODES = "\n".join(f"  {code.value:>3}  {meaning}" for code, meaning in MEANINGS.items())

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
    help="LottaLoRA artifacts: an adapter and a seed that are a whole model.",
    epilog=f"\b\nExit codes:\n{_CODES}",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("hf-lottalora"))
        raise typer.Exit


def _import(names: list[str] | None) -> None:
    if names:
        sys.path.append(str(Path.cwd()))  # behind all else: what lies in an artifact's folder must not become a module
    for name in names or ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise typer.BadParameter(f"{name}: {error}") from error


@app.callback()
def _lottalora(
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            help="Python module to import first, such as one that registers families; can be repeated.",
            metavar="MODULE",
            show_default=False,
            callback=_import,
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    pass


def _option(text: str, *names: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(*names, help=text, show_default=False)
    return option


@app.command()
def plan(
    path: Annotated[
        str,
        typer.Argument(
            help="config.json, folder or hub repository with one, or an artifact.", metavar="MODEL", show_default=False
        ),
    ],
    seed: Annotated[int | None, _option("Seed of the scaffold; default 0.")] = None,
    r: Annotated[int | None, _option("Rank of the adapters.", "--r", "-r")] = None,
    lora_alpha: Annotated[int | None, _option("B A is scaled by alpha / r.")] = None,
    family: Annotated[str | None, _option("Distribution of the scaffold.")] = None,
    redraw: Annotated[str | None, _option("What is drawn: all, targets or none.")] = None,
    embeddings: Annotated[str | None, _option("train, frozen or lora.")] = None,
    head: Annotated[str | None, _option("train, lora or lora_bias.")] = None,
    norms: Annotated[str | None, _option("train or frozen.")] = None,
    biases: Annotated[str | None, _option("train or frozen.")] = None,
    target_modules: Annotated[
        str | None, _option("Modules that carry adapters, with commas between; or all-linear.")
    ] = None,
    modules_to_save: Annotated[str | None, _option("Modules that are trained whole, with commas between.")] = None,
    use_dora: Annotated[bool, _option("With DoRA's magnitudes.", "--use-dora")] = False,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, another field of LottaLoraConfig; can be repeated.")
    ] = None,
    model_class: Annotated[
        str | None, _option("Class of transformers, such as AutoModelForCausalLM; default: that of config.json.")
    ] = None,
    dtype: Annotated[DtypeName | None, _option("Of the model; default: that of config.json, else float32.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens in a training step, for FLOPs.", min=1, max=10**15)] = 1,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Show what a model would be: roles of all tensors, sizes, memory and FLOPs. Nothing is drawn.

    \b
    Examples:
      lottalora plan path/to/config.json --r 8 --family binary
      lottalora plan user/model --target-modules q_proj,v_proj --embeddings lora
      lottalora plan path/to/artifact --tokens 4096 --json
    """  # noqa: D301
    with reporting(json):
        from hf_lottalora.cli.plan import plan as run

        names = None if target_modules is None else target_modules.split(",")
        options = {
            "seed": seed, "r": r, "lora_alpha": lora_alpha, "family": family, "redraw": redraw,
            "embeddings": embeddings, "head": head, "norms": norms, "biases": biases,
            "target_modules": target_modules if target_modules == "all-linear" else names,
            "modules_to_save": None if modules_to_save is None else modules_to_save.split(","),
            "use_dora": use_dora or None,
        }  # fmt: skip
        made = run(
            path,
            options=options,
            more=option or [],
            model_class=model_class,
            dtype=dtype,
            tokens=tokens,
            revision=revision,
            subfolder=subfolder,
            token=token,
        )
        finish(made, json)


@app.command()
def inspect(
    path: Artifact, revision: Revision = None, subfolder: Subfolder = None, token: Token = None, json: Json = False
) -> None:
    """Show what an artifact's files say: seed, family, ranks, digest, versions, tensors. No model is built.

    \b
    Examples:
      lottalora inspect path/to/artifact
      lottalora inspect user/name --revision main --json
    """  # noqa: D301
    with reporting(json):
        from hf_lottalora.cli.inspect import inspect as run

        finish(run(path, revision=revision, subfolder=subfolder, token=token), json)


@app.command()
def verify(
    path: Artifact,
    expect: Expect = None,
    residency: Annotated[Residency, typer.Option(help="How the scaffold is held meanwhile.")] = Residency.DENSE,
    base_model: BaseModel = None,
    named_base: NamedBase = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Check an artifact: every saved byte, and that every scaffold weight is drawn here as its digests say.

    \b
    Examples:
      lottalora verify path/to/artifact
      lottalora verify user/name --expect 8f14e45fceea167a5a36dedd4bea25433cb9a2ae2c1a7f3ac5e0a3d7b6a1c9d2
    """  # noqa: D301
    with reporting(json):
        from hf_lottalora.cli.verify import verify as run

        base = base_of(base_model, named_base)
        where = {"revision": revision, "subfolder": subfolder, "token": token}
        finish(run(path, expect=expect, base_model=base, residency=residency.value, **where), json)


@app.command()
def diff(
    first: Artifact,
    second: Artifact,
    revision: Revision = None,
    subfolder: Subfolder = None,
    revision_second: Annotated[str | None, _option("Of the second, where it is another.")] = None,
    subfolder_second: Annotated[str | None, _option("Of the second, where it is another.")] = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Compare two artifacts: options, architecture, scaffold, and which tensors differ how much.

    \b
    Examples:
      lottalora diff run/checkpoint-100 run/checkpoint-200
      lottalora diff user/name user/name --revision v1 --revision-second v2
    """  # noqa: D301
    with reporting(json):
        from hf_lottalora.cli.diff import diff as run

        where = {"revision": revision, "subfolder": subfolder, "token": token}
        second_where = {"revision_second": revision_second, "subfolder_second": subfolder_second}
        finish(run(first, second, **where, **second_where), json)


@app.command()
def export(
    path: Artifact,
    folder: Annotated[str, typer.Argument(help="Where to; missing or empty.", show_default=False)],
    form: Annotated[
        Form, typer.Option("--format", help="A checkpoint with everything merged, or base/ and adapter/ for PEFT.")
    ] = Form.DENSE,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "50GB",
    base_name: Annotated[str | None, _option("With --format lora: what the adapter calls its base.")] = None,
    base_model: BaseModel = None,
    named_base: NamedBase = False,
    force: Force = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Write a checkpoint that transformers loads without this package, a tensor at a time.

    \b
    Examples:
      lottalora export path/to/artifact path/to/checkpoint --dtype bfloat16
      lottalora export user/name path/to/folder --format lora --base-name user/base
    """  # noqa: D301
    with reporting(json):
        base = base_of(base_model, named_base)
        if base_name is not None and form is Form.DENSE:
            raise typer.BadParameter("--base-name is for --format lora.")
        from hf_lottalora.cli.export import export as run

        options = {"dtype": dtype, "max_shard_size": max_shard_size, "base_model": base, "overwrite": force}
        where = {"revision": revision, "subfolder": subfolder, "token": token}
        finish(run(path, folder, form=form.value, base_name=base_name, **options, **where), json)


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="Folder that save_pretrained has written.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="user/name; made where there is none.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is made.")] = False,
    revision: Annotated[str | None, _option("Branch, made where there is none.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    commit_message: Annotated[str | None, _option("Of the one commit.")] = None,
    tag: Annotated[list[str] | None, _option("A further tag for the card; can be repeated.")] = None,
    base_model: BaseModel = None,
    named_base: NamedBase = False,
    subfolder: Annotated[str | None, _option("Of an adapter that is not called default.")] = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Push a saved artifact to the hub: exactly its files, in one commit, after they were checked.

    \b
    Examples:
      lottalora push path/to/artifact user/name
      lottalora push path/to/artifact user/name --create-pr --commit-message "Trained longer"
    """  # noqa: D301
    with reporting(json):
        base = base_of(base_model, named_base)
        from hf_lottalora.cli.transfer import push as run

        pushed = run(
            folder,
            repo_id,
            subfolder=subfolder,
            base_model=base,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            tags=tag or (),
            token=token,
        )
        finish(pushed, json)


@app.command()
def pull(
    path: Annotated[str, typer.Argument(help="user/name.", metavar="REPO_ID", show_default=False)],
    folder: Annotated[str, typer.Argument(help="Where to; missing or empty.", show_default=False)],
    expect: Expect = None,
    force: Force = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Fetch an artifact from the hub: all files of one commit, checked, whole or not at all.

    \b
    Examples:
      lottalora pull user/name path/to/artifact
      lottalora pull user/name path/to/artifact --revision v1 --force
    """  # noqa: D301
    with reporting(json):
        from hf_lottalora.cli.transfer import pull as run

        where = {"revision": revision, "subfolder": subfolder, "token": token}
        finish(run(path, folder, expect=expect, overwrite=force, **where), json)
