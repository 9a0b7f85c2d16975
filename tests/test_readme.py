from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_lottalora import FAMILIES, LottaLoraConfig
from hf_lottalora.scaffold.scales import SCALE_RULES

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_usage_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(code, {})
    assert "LottaLoRA plan for LlamaForCausalLM, seed 42" in capsys.readouterr().out
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


def test_files_named_in_the_readme_exist() -> None:
    root = Path(__file__).parents[1]
    for name in re.findall(r"`(\w+\.py)`", README):
        assert list((root / "src").rglob(name)) or list((root / "examples").rglob(name)) or name == "run_glue.py", name
    for path in re.findall(r"(?:python|torchrun[^`]*?) ((?:benchmarks|examples)/[\w/]+\.py)", README):
        assert (root / path).is_file(), path


def test_the_page_of_families_is_that_of_the_code() -> None:
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    families = [
        f"| `{f.name}` | {f.description} | {f.bits} | {f.scale_rule} | {'bit' if f.exact else 'tolerance'} |"
        for f in FAMILIES.values()
    ]
    assert rows == families + [f"| `{name}` | {what} |" for name, what in SCALE_RULES.items()]


def test_options_in_the_readme_are_those_of_the_config() -> None:
    shown = re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", README, flags=re.MULTILINE)))
    filled_in = {"format_version", "generator", "lottalora_version", "scaffold_digests", "kept_digests", "other_dtypes"}
    filled_in |= {"resolved_targets", "padding_rows"}
    assert LottaLoraConfig.__annotations__.keys() - filled_in <= set(shown)


def test_tests_named_in_the_docs_exist() -> None:
    tests = Path(__file__).parent
    named = re.findall(r"`(test_\w+\.py)`", (tests.parent / "docs" / "features.md").read_text())
    assert named and all(list(tests.rglob(name)) for name in named)
