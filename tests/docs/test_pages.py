"""What the pages say is what the code has."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache

import pytest
import yaml
from pages import PAGES, ROOT, blocks

from hf_lottalora import FAMILIES, LottaLoraConfig
from hf_lottalora.scaffold.scales import SCALE_RULES


def page(stem: str) -> str:
    return (ROOT / "docs" / f"{stem}.md").read_text(encoding="utf-8")


def test_files_that_pages_name_exist() -> None:
    for path in PAGES:
        text = path.read_text()
        for file in re.findall(r"`(?:[\w/]+/)?(\w+\.py)`", text):
            folders = ("src", "examples", "benchmarks", "tests")
            assert any(list((ROOT / folder).rglob(file)) for folder in folders) or file == "run_glue.py", (path, file)


def test_the_page_of_families_is_that_of_the_code() -> None:
    rows = [line for line in page("families").splitlines() if line.startswith("| `")]
    families = [
        f"| `{f.name}` | {f.description} | {f.bits} | {f.scale_rule} | {'bit' if f.exact else 'tolerance'} |"
        for f in FAMILIES.values()
    ]
    assert rows == families + [f"| `{rule}` | {what} |" for rule, what in SCALE_RULES.items()]


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert cited["references"][0]["url"] in page("index")


def test_options_are_those_of_the_config() -> None:
    shown = re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", page("options"), flags=re.MULTILINE)))
    filled_in = {"format_version", "generator", "lottalora_version", "scaffold_digests", "kept_digests", "other_dtypes"}
    filled_in |= {"resolved_targets", "padding_rows"}
    assert LottaLoraConfig.__annotations__.keys() - filled_in <= set(shown)


@cache
def messages() -> str:
    """Every string in the source, one a line; `...` stands for what is filled in."""
    found = []
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "..." for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("{}", "..."))
    return "\n".join(" ".join(text.split()) for text in found)


def quoted(stem: str) -> list[str]:
    """Messages that a page quotes without raising them: those are checked where its code runs."""
    found = blocks(ROOT / "docs" / f"{stem}.md")
    alone = [b for before, b in zip([None, *found], found, strict=False) if not before or before.language != "python"]
    return [" ".join(block.code.split()) for block in alone if block.language == "text"]


@pytest.mark.parametrize("message", quoted("troubleshooting"))
def test_quoted_errors_are_those_of_the_source(message: str) -> None:
    assert message in messages()


def test_a_misquoted_error_is_none_of_the_source() -> None:
    assert "Pass for example seed=43." not in messages()


def test_pages_are_in_the_navigation() -> None:
    navigation = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    pages = {path.name for path in PAGES if path.parent == ROOT / "docs"}
    assert pages | {"contributing.md", "changelog.md"} == set(navigation) and len(set(navigation)) == len(navigation)
