"""What `mkdocs build` does besides: pages and figures from outside of docs/, options' help, and nothing from afar."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Files of the repository and where the site has them. Pages link to them as on the left, from docs/.
OUTSIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"} | {
    str(figure.relative_to(ROOT)): f"assets/{figure.name}" for figure in (ROOT / "benchmarks/results").rglob("*.png")
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is outside."""
    for path, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as they are on the site."""
    if page.file.src_uri in OUTSIDE.values():
        return markdown.replace("](docs/", "](")
    for path, place in OUTSIDE.items():
        markdown = markdown.replace(f"](../{path}", f"]({place}")
    return markdown


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Refuse a page that loads something from another server.

    Raises:
        PluginError: it would, and which address.
    """
    tags = re.findall(r"<(?:script|img|iframe|link(?![^>]*canonical))\b[^>]*>", output)
    remote = [address for tag in tags for address in re.findall(r'(?:src|href)="((?:https?:)?//[^"]+)"', tag)]
    if remote:
        raise PluginError(f"{page.file.src_uri} loads {remote[0]}: the site must work without a network.")
    return output


class Docstrings(griffe.Extension):
    """What is written for `help()`, as mkdocstrings reads it."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Fields of `LottaLoraConfig` have their text in `field(..., metadata={"help": ...})`."""
        if attr.docstring is None and "metadata" in str(attr.value):
            call = ast.parse(str(attr.value), mode="eval").body
            assert isinstance(call, ast.Call)
            metadata = next(keyword.value for keyword in call.keywords if keyword.arg == "metadata")
            attr.docstring = griffe.Docstring(ast.literal_eval(metadata)["help"], parent=attr)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """A section "Example" is one of code."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
