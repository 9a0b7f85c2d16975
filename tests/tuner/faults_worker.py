"""Run by test_faults.py on each rank: training in which rank 1 kills or stops itself. Arguments: folder, case."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import engines
import torch.distributed as dist
from fsdp2_worker import ROWS, arguments, build
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback

# Engine, moment, and what rank 1 does to itself then.
CASES = {
    "killed in a step": ("ddp", "step", signal.SIGKILL),
    "stopped before the check": ("ddp", "check", signal.SIGSTOP),
    "stopped in a step": ("fsdp2", "step", signal.SIGSTOP),
    "stopped when saving": ("fsdp2", "save", signal.SIGSTOP),
}


class Fault(TrainerCallback):
    def __init__(self, folder: Path, case: str) -> None:
        self.folder = folder
        _, self.moment, self.signal = CASES[case]

    def reached(self, moment: str) -> None:
        if moment == self.moment and os.environ["RANK"] == "1":
            (self.folder / "fault").touch()
            os.kill(os.getpid(), self.signal)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.reached("step")


def main() -> None:
    folder, case = Path(sys.argv[1]), sys.argv[2]
    engine = CASES[case][0]
    engines.allow_fsdp()
    fault = Fault(folder, case)
    # As TrainingArguments(ddp_timeout=30) would, did it not leave that out with use_cpu.
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    args = arguments(folder / "out", **({} if engine == "fsdp2" else {"fsdp": False}))
    trainer = Trainer(build(), args, train_dataset=ROWS, callbacks=[fault])
    fault.reached("check")
    trainer.train()
    assert isinstance(trainer.model, FSDPModule) == (engine == "fsdp2"), "another engine is active"
    fault.reached("save")
    trainer.save_model(str(folder / "saved"))
    (folder / "finished").touch()


if __name__ == "__main__":
    main()
