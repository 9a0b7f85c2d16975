"""What `siblings.py` trains its adapters on: the networks, data and loops of the other benchmarks, task by task."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import hf_lottalora  # noqa: F401  # isort: skip  # first: it registers the method with PEFT
import cifar10
import mnist
import saved_dtypes
import sst2
import torch
from cli import FIRST_SEED
from peft import PeftModel
from safetensors.torch import save
from torch import nn
from transformers import AutoTokenizer, set_seed

FULL, HEAD = "full training", "head and betas"
NOLA = {"adapter": "nola", "r": 8, "basis_family": "binary"}
# NOLA of one basis has two numbers a layer: frozen, they leave head and betas, in the smallest file there is.
WAYS: dict[str, dict[str, Any]] = {
    FULL: {},
    HEAD: {"adapter": "nola", "r": 1, "bases": 1},
    "LoRA r = 1": {"r": 1, "lora_alpha": 1},
    "LoRA r = 3": {"r": 3, "lora_alpha": 3},
    "LoRA r = 8": {"r": 8, "lora_alpha": 8},
    "RandLoRA r = 16": {"adapter": "randlora", "r": 16},
    "RandLoRA r = 64": {"adapter": "randlora", "r": 64},
    "NOLA k = 256": {**NOLA, "bases": 256},
    "NOLA k = 256, per layer": {**NOLA, "bases": 256, "bases_shared": "layer"},
    "NOLA k = 1,024": {**NOLA, "bases": 1024},
}
DEFAULT = tuple(WAYS)
# Other distributions of the bases, trained at the same rates.
FAMILIES = {
    f"{way}, {family}": {**WAYS[way], "basis_family": family}
    for way, families in (
        ("RandLoRA r = 16", ("normal", "binary", "ternary")),
        ("NOLA k = 256", ("uniform",)),
    )
    for family in families
}
WAYS |= FAMILIES


class Task(NamedTuple):
    """What is trained, and how it is scored.

    `build(way, backbone, seed, args)` makes a model. `fit(model, way, backbone, seed, args)` trains it at `args.lr` and
    scores it: on held-out training rows, after a short run, with `args.choosing`, else on the test rows.
    """

    build: Callable[[str, str, int, argparse.Namespace], nn.Module]
    fit: Callable[[nn.Module, str, str, int, argparse.Namespace], float]
    backbones: tuple[str, ...] = ("drawn",)
    measure: str = "accuracy %"
    ways: tuple[str, ...] = DEFAULT
    seeds: int = 3

    @property
    def best(self) -> Callable[..., Any]:
        """Of scores, that of the better model."""
        return min if self.measure == "loss" else max


def changed(args: argparse.Namespace, **values: Any) -> argparse.Namespace:
    """The arguments with other values."""
    return argparse.Namespace(**{**vars(args), **values})


def _head_alone(model: nn.Module, way: str) -> nn.Module:
    """The model; of `HEAD` without the gradients of what stands for A and B."""
    if way == HEAD:
        for name, parameter in model.named_parameters():
            if "lora_" in name and "lora_beta" not in name:
                parameter.requires_grad_(False)
    return model


def _build_mnist(way: str, backbone: str, seed: int, args: argparse.Namespace) -> nn.Module:
    if backbone in ("kept", "noisy"):
        network = deepcopy(_trained_on_low_digits(str(args.data_dir), args.device, args.batch_size, args.quick))
    else:
        torch.manual_seed(seed)
        network = mnist.MLP(mnist.WIDTHS["medium"])
    redraw = {"kept": "none", "noisy": "targets"}.get(backbone, "all")
    return network if way == FULL else mnist.adapted(network, seed, redraw=redraw, **WAYS[way])


@cache
def _trained_on_low_digits(data_dir: str, device: str, batch_size: int, quick: bool) -> mnist.MLP:
    """The medium network after five epochs of full training on the digits 0 to 4."""
    args = argparse.Namespace(data_dir=Path(data_dir), device=device, batch_size=batch_size, quick=quick, workers=1)
    args.epochs = 1 if quick else 5
    train, _ = mnist.load_data(args)
    torch.manual_seed(FIRST_SEED)
    network = mnist.MLP(mnist.WIDTHS["medium"])
    mnist.fit(network, train[train.y < 5], FIRST_SEED, args)
    return network


def _fit_mnist(high_digits: bool) -> Callable[..., float]:
    """Training on all digits, or on 5 to 9."""

    def fit(model: nn.Module, way: str, backbone: str, seed: int, args: argparse.Namespace) -> float:
        train, test = (part[part.y >= 5] if high_digits else part for part in mnist.load_data(args))
        epochs = 1 if args.choosing else args.epochs
        curve = mnist.fit(model, train, seed, changed(args, epochs=epochs), lr=args.lr)
        return 100 * (curve[-1] if args.choosing else mnist.accuracy(model, test))

    return fit


def _sst2_args(args: argparse.Namespace) -> argparse.Namespace:
    fixed = {"max_seq_length": 64, "search_rows": 16_000, "rank": 8, "epochs": 1.0, "batch_size": 64}
    return changed(args, **fixed)


@cache
def _sst2_data(data_dir: str, quick: bool) -> sst2.Data:
    return sst2.load_data(_sst2_args(argparse.Namespace(data_dir=data_dir, quick=quick)))


def _build_sst2(way: str, backbone: str, seed: int, args: argparse.Namespace) -> nn.Module:
    words = len(_sst2_data(str(args.data_dir), args.quick).tokenizer)
    return sst2.build_model("full" if way == FULL else "lottalora-frozen", seed, 8, words, **WAYS[way])


def _fit_sst2(model: nn.Module, way: str, backbone: str, seed: int, args: argparse.Namespace) -> float:
    data = _sst2_data(str(args.data_dir), args.quick)
    sets = (data.search_train, data.search_dev) if args.choosing else (data.train, data.validation)
    return 100 * float(sst2.run(way, seed, args.lr, *sets, data, _sst2_args(args), model)["accuracy"])


def _build_cifar10(way: str, backbone: str, seed: int, args: argparse.Namespace) -> nn.Module:
    return cifar10.build_model("full" if way == FULL else way, seed, WAYS[way])


def _fit_cifar10(model: nn.Module, way: str, backbone: str, seed: int, args: argparse.Namespace) -> float:
    epochs = 1 if args.choosing else args.epochs
    args = changed(args, validate=args.choosing, epochs=epochs)
    return 100 * float(cifar10.run("full" if way == FULL else way, seed, args, model)["test_accuracy"])


@cache
def _wikitext(data_dir: str, quick: bool) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Size of the vocabulary, and rows of tokens to train on and to score by."""
    args = argparse.Namespace(data_dir=Path(data_dir), quick=quick)
    tokenizer = AutoTokenizer.from_pretrained(str(args.data_dir / "tokenizers" / "bert-base-uncased"))
    train = saved_dtypes.tokens_of(args, "train", tokenizer)
    return len(tokenizer), train, saved_dtypes.tokens_of(args, "valid", tokenizer, saved_dtypes.EVALUATED)


def _build_wikitext(way: str, backbone: str, seed: int, args: argparse.Namespace) -> nn.Module:
    set_seed(seed)
    network = saved_dtypes.build_network("trained", _wikitext(str(args.data_dir), args.quick)[0])
    return network if way == FULL else saved_dtypes.adapted(network, "trained", seed=seed, **WAYS[way])


def _fit_wikitext(model: nn.Module, way: str, backbone: str, seed: int, args: argparse.Namespace) -> float:
    _, train, test = _wikitext(str(args.data_dir), args.quick)
    held_out = min(len(test), len(train) // 5)
    if args.choosing:
        train, test = train[held_out:], train[:held_out]
    steps = 3 if args.quick else 60 if args.choosing else 240
    saved_dtypes.train("trained", train, changed(args, steps=steps), model, seed)
    return saved_dtypes.evaluate(model, test)


# Of the layers of this network no two have an A or a B of one size: there is nothing that NOLA could share.
_MNIST = tuple(way for way in DEFAULT if way != "NOLA k = 256, per layer")
TASKS = {
    "mnist": Task(_build_mnist, _fit_mnist(high_digits=False), ways=_MNIST),
    "digits": Task(_build_mnist, _fit_mnist(high_digits=True), ("kept", "noisy", "drawn"), ways=_MNIST),
    "sst2": Task(_build_sst2, _fit_sst2),
    "cifar10": Task(_build_cifar10, _fit_cifar10, seeds=1),
    "wikitext": Task(_build_wikitext, _fit_wikitext, measure="loss", seeds=1),
}


def train(task: str, way: str, backbone: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run: the score, how much was trained, and the bytes of the file."""
    torch.set_num_threads(args.threads)
    of, start = TASKS[task], time.process_time()
    model = _head_alone(of.build(way, backbone, seed, args), way).to(args.device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    score = of.fit(model, way, backbone, seed, args)
    return {
        "score": round(score, 6),
        "lr": args.lr,
        "trained": trained,
        "scaling": None if way == FULL else _scaling(model),
        "bytes": {} if args.choosing else file_sizes(model),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def _scaling(model: PeftModel) -> float:
    config = model.peft_config["default"]
    return config.lora_alpha / config.r


def file_sizes(model: nn.Module) -> dict[str, int]:
    """Bytes of the weights as they are saved, by dtype; of a network without adapters, of all its weights."""
    if not isinstance(model, PeftModel):
        return {"exact": len(save({name: p.detach().contiguous() for name, p in model.named_parameters()}))}
    sizes = {}
    for dtype in (None, "float16", "int8"):
        model.peft_config["default"].save_dtype = dtype
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            sizes[dtype or "exact"] = Path(folder, "adapter_model.safetensors").stat().st_size
    return sizes
