from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. It wants to know before others import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hub import hub as hub
from peft import PeftModel, get_peft_model
from tiny import config, llama, perturb

# The models here are tiny: a second thread would only wait for the first.
torch.set_num_threads(1)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[PeftModel, Path]:
    """A trained Llama adapter and where it was saved."""
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM")).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "artifact")
    return model, tmp_path / "artifact"
