"""The counter of `benchmarks/scale`: every collective of four ranks once, against the sizes of the tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_gather_tensor, all_reduce
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "scale"))

from traffic import Traffic

RANKS = 4
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # other names in newer versions


@pytest.fixture
def traffic() -> Iterator[Traffic]:
    """Of rank 0 of four; the others are not there, and what they would send is missing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    with Traffic() as counting:
        yield counting
    dist.destroy_process_group()


def tensor(elements: int = 8) -> torch.Tensor:
    return torch.ones(elements)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: dist.broadcast(tensor(), 0), {"broadcast": 32}),
        (lambda: dist.all_reduce(tensor().bfloat16()), {"all_reduce": 16}),
        (lambda: dist.all_gather_into_tensor(tensor(8 * RANKS), tensor()), {"all_gather": 128}),
        (lambda: dist.all_gather([tensor() for _ in range(RANKS)], tensor()), {"all_gather": 128}),
        (lambda: dist.reduce_scatter_tensor(tensor(), tensor(8 * RANKS)), {"reduce_scatter": 128}),
        (lambda: dist.scatter(tensor(), [tensor() for _ in range(RANKS)]), {"scatter": 128}),
        (lambda: dist.barrier(), {}),
        (lambda: all_reduce(tensor(), "sum", dist.group.WORLD).sum(), {"all_reduce": 32}),
        (lambda: all_gather_tensor(tensor(), 0, dist.group.WORLD).sum(), {"all_gather": 128}),
        (lambda: tensor().sum(), {}),
    ],
)
def test_each_collective_counts_its_whole_tensor(
    traffic: Traffic, call: Callable[[], object], expected: dict[str, int]
) -> None:
    call()
    assert traffic.take() == expected and traffic.take() == {}


def test_what_a_dtensor_calls(traffic: Traffic) -> None:
    mesh = DeviceMesh("cpu", list(range(RANKS)))
    sharded = distribute_tensor(tensor(), mesh, [Shard(0)])
    traffic.take()
    sharded.redistribute(mesh, [Replicate()])
    assert traffic.take() == {"all_gather": 32}


def test_what_ddp_calls_from_cpp() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # DDP needs what collectives return
    with Traffic() as traffic:
        model = nn.Linear(8, 4)
        model.weight.requires_grad_(False)  # broadcast at the start all the same, as DDP does
        wrapped = DistributedDataParallel(model)
        weights = 32 * 4 + 4 * 4
        assert weights <= traffic.take()["broadcast"] < weights + 100  # and the shapes, which DDP compares
        wrapped(torch.ones(2, 8)).sum().backward()
        assert traffic.take() == {"all_reduce": 16}
    dist.destroy_process_group()


def test_what_fsdp2_calls(traffic: Traffic) -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False))
    for layer in model:
        fully_shard(layer, mesh=DeviceMesh("cpu", list(range(RANKS))), reshard_after_forward=True)
    traffic.take()
    output = model(torch.ones(2, 8))
    assert traffic.take() == {"all_gather": 2 * 32 * 4}
    output.sum().backward()
    assert traffic.take() == {"all_gather": 2 * 32 * 4, "reduce_scatter": 2 * 32 * 4}
