"""Training on several processes by the engines of Accelerate: the same model as by one, and no weight sent around."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsdp2_worker
import pytest
import torch
from accelerate.utils import compare_versions
from safetensors.torch import load_file

from hf_lottalora import AutoLottaLoraModelForCausalLM
from hf_lottalora.artifact.manifest import MANIFEST_KEY

pytestmark = [
    pytest.mark.smoke,  # a launch takes a minute
    pytest.mark.skipif(compare_versions("accelerate", "<", "1.15"), reason="FSDP2 is refused with it"),
]

WORKERS = Path(__file__).parent
RANKS = 2


def launch(ranks: int, *arguments: Path) -> None:
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*torchrun, WORKERS / "fsdp2_worker.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a run on two ranks, and what each has found."""
    folder = tmp_path_factory.mktemp("fsdp2")
    launch(RANKS, folder)
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", fsdp2_worker.OPTIONS)
def test_fsdp2_trains_what_one_process_trains(
    fsdp2: tuple[Path, list[dict[str, Any]]], name: str, tmp_path: Path
) -> None:
    folder, found = fsdp2
    alone = fsdp2_worker.train(tmp_path / "out", options=fsdp2_worker.OPTIONS[name])
    for rank in found:
        torch.testing.assert_close(rank[name]["losses"], fsdp2_worker.losses(alone), rtol=1e-4, atol=0)
        assert rank[name]["resumed"] == rank[name]["losses"] and rank[name]["resumes to the bit"]
    alone.save_model(str(tmp_path / "saved"))
    mine = load_file(folder / name / "saved" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert mine.keys() == theirs.keys()
    for key in mine.keys() - {"lottalora_manifest"}:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-3, atol=1e-4)
    AutoLottaLoraModelForCausalLM.from_pretrained(folder / name / "saved").verify_scaffold(full=True)


def test_fsdp2_draws_each_shard_where_it_is(fsdp2: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank in fsdp2[1]:
        dense, packed, streamed = rank["dense"], rank["packed"], rank["streamed"]
        assert dense["sent"] == packed["sent"] == streamed["sent"] == 0
        assert dense["drawn"] == dense["shards"] + dense["A"] < 0.52 * dense["total"] and not dense["whole"]
        for left in (packed, streamed):  # no shard of it, and no copy anywhere else
            assert len(left["whole"]) == 14 and left["whole"] == packed["whole"]
            assert set(left["sharded"]) == set(dense["sharded"]) - set(left["whole"])


def test_what_trainer_does_with_checkpoints_under_fsdp2(
    fsdp2: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, found = fsdp2
    alone = fsdp2_worker.go_on(tmp_path, folder / "dense" / "checkpoint-2")
    for rank in found:
        torch.testing.assert_close(rank["went on"], alone, rtol=1e-4, atol=0)
        assert rank["sharded"]["resumed"] == rank["sharded"]["losses"] == rank["packed"]["losses"]
        first, *later = rank["best"]["losses"]
        assert rank["best"]["at the end"] == first > max(later)
    content = load_file(folder / "kept" / "saved" / "adapter_model.safetensors")[MANIFEST_KEY]
    assert json.loads(bytes(content.numpy()))["kept_bytes"]


def test_a_checkpoint_is_resumed_on_another_number_of_ranks(
    fsdp2: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, found = fsdp2
    launch(1, tmp_path, folder / "packed" / "checkpoint-2")
    resumed = json.loads((tmp_path / "resumed.json").read_text())
    torch.testing.assert_close(resumed, found[0]["packed"]["losses"], rtol=1e-4, atol=0)


def test_mixed_precision_under_fsdp2(fsdp2: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank in fsdp2[1]:
        assert rank["half"]["trained in"] == ["torch.float32"]
        torch.testing.assert_close(rank["half"]["losses"], rank["packed"]["losses"], rtol=0.02, atol=0)
        assert rank["half refused"].startswith("Mixed precision computes in torch.bfloat16")


def test_what_fsdp2_cannot_have_is_refused_on_every_rank(fsdp2: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank in fsdp2[1]:
        assert rank["efficient loading"].startswith("cpu_ram_efficient_loading=True broadcasts every weight")
        assert "Ranks [1] have another scaffold than rank 0, the first tensor is" in rank["another seed"]
