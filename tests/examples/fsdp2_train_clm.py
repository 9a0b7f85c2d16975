"""`train_clm.py` under FSDP2 on CPU processes; run by test_train_clm.py under torchrun."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import engines
import train_clm
from arguments import run

if __name__ == "__main__":
    engines.allow_fsdp()
    run(train_clm.main)
