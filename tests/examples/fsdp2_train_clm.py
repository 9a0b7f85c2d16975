"""`train_clm.py` under FSDP2 on CPU processes; run by test_train_clm.py under torchrun."""

import sys
from pathlib import Path

for folder in ("tests/helpers", "examples"):
    sys.path.insert(0, str(Path(__file__).parents[2] / folder))

import engines  # noqa: E402

engines.allow_fsdp()

import train_clm  # noqa: E402
from arguments import run  # noqa: E402

run(train_clm.main)
