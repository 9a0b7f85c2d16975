from __future__ import annotations

import re
from pathlib import Path

import pytest

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
    for path in re.findall(r"(?:python|torchrun[^`]*?) ((?:benchmarks|examples)/\w+\.py)", README):
        assert (root / path).is_file(), path
