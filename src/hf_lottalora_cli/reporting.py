"""What a command prints, and with which code it exits."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import typer


class ExitCode(IntEnum):
    """With what a command exits; `MEANINGS` says what each is."""

    FINE = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    INTERRUPTED = 130


MEANINGS = {
    ExitCode.FINE: "done; the check passed, or the two are the same",
    ExitCode.FAILED: "a check failed, or the two differ",
    ExitCode.USAGE: "wrong usage: an unknown command or option, or options that cannot be meant",
    ExitCode.REFUSED: "refused, or something cannot be read, reached or written",
    ExitCode.INTERRUPTED: "interrupted",
}


@contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """Within the context, errors that say what to do end the command with their text instead of a traceback.

    They go to standard error, warnings too. With `as_json`, standard output gets `{"error": ...}`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the libraries, for those who call them
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            yield
    except KeyboardInterrupt:
        typer.echo("lottalora: interrupted", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("HF_DEBUG"):  # as huggingface_hub's own command
            raise
        typer.echo(f"lottalora: error: {error}", err=True)
        typer.echo("The environment variable HF_DEBUG=1 shows the traceback.", err=True)
        if as_json:
            print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        raise typer.Exit(getattr(error, "exit_code", ExitCode.REFUSED)) from error


def finish(outcome: Any, as_json: bool) -> None:
    """Print what a command has found, and exit with the code for it."""
    if as_json:
        print_json(outcome.data)
    else:
        typer.echo(outcome.text)
    raise typer.Exit(ExitCode.FINE if outcome.passed else ExitCode.FAILED)


def print_json(data: Any) -> None:
    """Print one JSON document to standard output."""
    json.dump(data, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def _show_warning(message: Warning | str, *_: Any) -> None:
    typer.echo(f"lottalora: warning: {message}", err=True)
