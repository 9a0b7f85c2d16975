"""Base models that something has wrapped: one scaffold, or a refusal that names the wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import get_peft_model
from tiny import config, llama, logits, mlp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from hf_lottalora import make_plan


@pytest.fixture
def one_process() -> Iterator[None]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def inside(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = llama()
    model.model.layers[1] = wrap(model.model.layers[1])
    return model


WRAPPED: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "compiled": ("The model is wrapped in a OptimizedModule, which puts '_orig_mod'", lambda: torch.compile(llama())),
    "data parallel": ("The model is wrapped in a DataParallel, which puts 'module'", lambda: nn.DataParallel(llama())),
    "averaged": ("The model is wrapped in a AveragedModel, which puts 'module'", lambda: AveragedModel(llama())),
    "a compiled layer": (
        "'model.layers.1' is wrapped in a OptimizedModule, which puts '_orig_mod'",
        lambda: inside(torch.compile),
    ),
    "a checkpointed layer": (
        "'model.layers.1' is wrapped in a CheckpointWrapper, which puts '_checkpoint_wrapped_module'",
        lambda: inside(checkpoint_wrapper),
    ),
    "a compiled part of a plain module": (
        "'2' is wrapped in a OptimizedModule, which puts '_orig_mod'",
        lambda: nn.Sequential(*mlp()[:2], torch.compile(mlp()[2]), *mlp()[3:]),
    ),
}


def refused(model: nn.Module, message: str) -> None:
    names = [name for name, _ in model.named_modules()]
    options = config(target_modules=["q_proj", "0"], modules_to_save=["4"])
    for call in (make_plan, get_peft_model):
        with pytest.raises(ValueError, match=message):
            call(model, options)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_bases_are_refused_by_name(name: str) -> None:
    message, build = WRAPPED[name]
    refused(build(), f"{message}.*Pass what is inside, and wrap the model that get_peft_model returns")


@pytest.mark.filterwarnings("ignore:.*NO_SHARD")
def test_distributed_wrappers_are_refused_by_name(one_process: Any) -> None:
    refused(DistributedDataParallel(llama()), "The model is wrapped in a DistributedDataParallel, which puts 'module'")
    sharded = FullyShardedDataParallel(llama(), device_id=torch.device("cpu"))
    refused(sharded, "The model is wrapped in a FullyShardedDataParallel, which puts '_fsdp_wrapped_module'")
    mesh = init_device_mesh("cpu", (1,))
    refused(fully_shard(llama(), mesh=mesh), "The model is sharded by fully_shard")
    refused(inside(lambda layer: fully_shard(layer, mesh=mesh)), "'model.layers.1' is sharded by fully_shard")


def test_a_plan_alone_of_partitioned_parameters_is_refused_by_name() -> None:
    model = llama()
    model.model.norm.weight.ds_tensor = torch.empty(0)  # as deepspeed.zero.Init leaves it
    with pytest.raises(ValueError, match=r"'model.norm' is partitioned by DeepSpeed's ZeRO-3.*get_peft_model"):
        make_plan(model, config())


def test_tensor_parallel_bases_are_refused_by_name(one_process: Any) -> None:
    model, mesh = llama(), init_device_mesh("cpu", (1,))
    parallelize_module(model.model.layers[1].self_attn.q_proj, mesh, ColwiseParallel())
    refused(model, "'model.layers.1.self_attn.q_proj' is sharded over processes, as by tensor parallelism")


def compiled_in_place() -> nn.Module:
    model = llama()
    model.model.layers[0].compile(backend="eager")
    model.compile(backend="eager")
    return model


def prepared() -> nn.Module:
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's Accelerator may have had another precision
    model: nn.Module = Accelerator(cpu=True, mixed_precision="bf16").prepare(llama())
    AcceleratorState._reset_state(reset_partial_state=True)
    return model


@pytest.mark.parametrize("build", [compiled_in_place, prepared])
def test_what_changes_no_name_draws_the_same(build: Callable[[], nn.Module]) -> None:
    plain, other = get_peft_model(llama(), config()), get_peft_model(build(), config())
    assert other.get_plan().scaffold_digests() == plain.get_plan().scaffold_digests()
    other.verify_scaffold(full=True)
    torch.testing.assert_close(logits(other).float(), logits(plain), atol=0.1, rtol=0.1)
