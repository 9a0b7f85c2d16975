"""What holds for every training script in `examples/`; `train_glue.py` has tests of the same of its own."""

from __future__ import annotations

import runpy
from dataclasses import fields
from types import ModuleType

import pytest
import train_clm
import train_image
import train_seq2seq
import train_speech
from accelerate.commands.launch import launch_command_parser
from scripts import ROOT
from torch.distributed.run import get_args_parser

SCRIPTS = [train_clm, train_image, train_seq2seq, train_speech]


def test_every_script_is_here() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("train_*.py")}
    assert {script.__name__ for script in SCRIPTS} == names - {"train_glue"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_have_help_and_launchers_leave_them_alone(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [str(script.__file__), "--help"])
    with pytest.raises(SystemExit):
        script.main()
    shown = capsys.readouterr().out
    launchers = (get_args_parser(), launch_command_parser())
    for arguments in (script.ModelArguments, script.DataArguments, script.LottaLoraArguments):
        for option in fields(arguments):
            assert f"--{option.name}" in shown and option.metadata["help"]
            for parser in launchers:
                assert parser.parse_args(["x.py", f"--{option.name}", "1"]).training_script_args[1:] == ["1"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_errors_are_one_line_on_the_command_line(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(script.__file__), "--output_dir", "out"])
    with pytest.raises(SystemExit, match=rf"^{script.__name__}.py: error: Pass --do_train, --do_eval or both"):
        runpy.run_path(str(script.__file__), run_name="__main__")
