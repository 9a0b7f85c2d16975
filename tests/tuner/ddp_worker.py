"""Run by test_train_glue.py under torchrun: what DistributedDataParallel does with a scaffold. Prints OK per rank."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification

from hf_lottalora import LottaLoraConfig, RanksAgreeCallback, check_ranks_agree

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def build(seed: int, **options: Any) -> torch.nn.Module:
    torch.manual_seed(dist.get_rank())  # ranks need not agree on anything but the config
    config = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return get_peft_model(
        BertForSequenceClassification(config), LottaLoraConfig(seed=seed, r=2, task_type="SEQ_CLS", **options)
    )


def equal_on_all_ranks(tensor: torch.Tensor) -> bool:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.detach().clone())
    return all(torch.equal(found[0], other) for other in found)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    model = build(seed=7)
    check_ranks_agree(model)
    scaffold = {
        name
        for name, _ in model.named_parameters()
        if name.removeprefix("base_model.model.").replace("base_layer.", "") in model.base_model.get_plan().scaffold
    }
    parameters = dict(model.named_parameters())
    assert len(scaffold) == len(model.base_model.get_plan().scaffold) == 2 * 6 + 1
    assert sorted(model._ddp_params_and_buffers_to_ignore) == sorted(scaffold)

    # Rank 1 differs in every parameter: wrapping equalises all but the scaffold.
    before = copy.deepcopy(model.state_dict())
    if rank == 1:
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(1)
    wrapped = DistributedDataParallel(model)
    for name, parameter in parameters.items():
        assert equal_on_all_ranks(parameter) == (name not in scaffold), name
        if name in scaffold:
            assert torch.equal(parameter, before[name] + rank), name
    with torch.no_grad():
        for name in scaffold:
            parameters[name].copy_(before[name])

    # Ranks train on different rows and stay together; the scaffold does not move.
    ids = torch.arange(24).reshape(3, 8) + rank
    optimizer = torch.optim.AdamW([p for p in parameters.values() if p.requires_grad], lr=0.1)
    for _ in range(2):
        wrapped(input_ids=ids, labels=torch.tensor([rank, 1, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(equal_on_all_ranks(parameter) for parameter in parameters.values())
    model.base_model.verify_scaffold(full=True)

    # A scaffold that is not in memory: ranks train the same adapters as over a dense one.
    trained = []
    for residency in ("dense", "packed", "streamed"):
        model_too = build(seed=7, embeddings="frozen", residency=residency)
        parallel = DistributedDataParallel(model_too)
        parallel(input_ids=ids, labels=torch.tensor([rank, 1, 0])).loss.backward()
        trained.append({name: p.grad for name, p in model_too.named_parameters() if p.requires_grad})
        check_ranks_agree(model_too)
        del parallel
    for other in trained[1:]:
        assert other.keys() == trained[0].keys()
        assert all(torch.equal(gradient, trained[0][name]) for name, gradient in other.items())

    # Of adapters whose A and B are made, coefficients alone travel.
    for made in ({"adapter": "randlora"}, {"adapter": "nola", "bases": 6}):
        model_too = build(seed=7, embeddings="frozen", **made)
        parallel = DistributedDataParallel(model_too)
        for _ in range(2):
            parallel(input_ids=ids, labels=torch.tensor([rank, 1, 0])).loss.backward()
        gradients = [p.grad for name, p in model_too.named_parameters() if p.requires_grad and "lora_" in name]
        assert len(gradients) == 3 * len(model_too.get_plan().adapters)
        assert all(equal_on_all_ranks(gradient) for gradient in gradients)
        assert sum(gradient.numel() for gradient in gradients) == model_too.get_plan().adapter_parameters
        assert not any("lora" in name for name, _ in model_too.named_buffers())
        del parallel

    # Another seed on rank 1 is noticed on every rank, also behind the wrapper.
    other = build(seed=7 + rank)
    for check in (check_ranks_agree, lambda m: RanksAgreeCallback().on_train_begin(None, None, None, model=m)):
        try:
            check(other)
        except RuntimeError as error:
            assert "Ranks [1] have another scaffold" in str(error)
        else:
            raise AssertionError("a rank with another seed went unnoticed")

    # So is a scaffold that changed on one rank, and no rank is left waiting for the others.
    if rank == 1:
        with torch.no_grad():
            parameters[next(iter(scaffold))].add_(1)
    try:
        check_ranks_agree(model)
    except RuntimeError as error:
        assert "Ranks [1] have another scaffold" in str(error) and "is not what seed" in str(error)
    else:
        raise AssertionError("a changed scaffold went unnoticed")
    print(f"rank {rank} of {dist.get_world_size()}: OK", flush=True)
    del wrapped  # it holds on to the process group, whose end would then wait for ranks that have gone
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
