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
        _say("lottalora: interrupted")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("HF_DEBUG"):  # as huggingface_hub's own command
            raise
        _say(f"lottalora: error: {error}\nThe environment variable HF_DEBUG=1 shows the traceback.")
        if as_json:
            _print(_json({"error": {"type": type(error).__name__, "message": str(error)}}))
        raise typer.Exit(getattr(error, "exit_code", ExitCode.REFUSED)) from error


def finish(outcome: Any, as_json: bool) -> None:
    """Print what a command has found, and exit with the code for it."""
    _print(_json(outcome.data) if as_json else outcome.text)
    raise typer.Exit(ExitCode.FINE if outcome.passed else ExitCode.FAILED)


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, allow_nan=False)


def _print(text: str) -> None:
    """Print to standard output; end the command where that cannot be written."""
    try:
        typer.echo(text)
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):  # else the reader has had enough
            _say(f"lottalora: error: standard output cannot be written: {error}")
        raise typer.Exit(ExitCode.REFUSED) from error


def _say(text: str) -> None:
    try:
        typer.echo(text, err=True)
    except OSError:
        _discard(sys.stderr)


def _discard(stream: Any) -> None:
    """Let go of what is waiting to be written: at the end of the process it would be tried again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _show_warning(message: Warning | str, *_: Any) -> None:
    _say(f"lottalora: warning: {message}")
