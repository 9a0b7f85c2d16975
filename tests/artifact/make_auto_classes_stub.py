"""Writes auto_classes.pyi, from which editors know the loaders. Run it with the newest transformers."""

from __future__ import annotations

from pathlib import Path

from hf_lottalora.artifact import auto_classes
from hf_lottalora.artifact.loaders import LOADERS

FILE = Path(auto_classes.__file__).with_suffix(".pyi")


def stub() -> str:
    names = "".join(f'    "{name}",\n' for name in LOADERS)
    classes = (
        f'\nclass {ours}(AutoLottaLora):\n    """{auto_classes.docstring(auto.__name__)}"""\n'
        for ours, auto in LOADERS.items()
    )
    return (
        "# Written by tests/artifact/make_auto_classes_stub.py\n"
        f"import os\nfrom typing import Any\n\nfrom .auto import AutoLottaLora\n\n__all__ = [\n{names}]\n\n"
        "def docstring(auto_name: str) -> str: ...\n"
        f"def loader_for(auto: Any, path: str | os.PathLike[str], **hub: Any) -> tuple[Any, str | None]: ...\n{''.join(classes)}"
    )


if __name__ == "__main__":
    FILE.write_text(stub())
