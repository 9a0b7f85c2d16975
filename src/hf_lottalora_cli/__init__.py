"""The command `lottalora`: its commands, options, help and exit codes.

A package of its own, since importing anything of `hf_lottalora` imports torch, transformers and PEFT, and help does not
wait for those. What the commands do is in `hf_lottalora.cli`, imported when one runs.
"""

from .app import app as app


def main() -> None:
    """Run the command that the arguments say, and exit."""
    app(prog_name="lottalora")
