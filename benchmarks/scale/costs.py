"""What start-up and a step of several processes cost: formulas in shapes and in the assumptions of `model.py`."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A Llama: layers, width, key-value width, width of the MLP, vocabulary."""

    layers: int
    d: int
    kv: int
    mlp: int
    vocabulary: int
    tied: bool = False

    @property
    def linears(self) -> list[tuple[int, int]]:
        """`(in, out)` of the linear maps of a layer."""
        d, kv, mlp = self.d, self.kv, self.mlp
        return [(d, d), (d, kv), (d, kv), (d, d), (d, mlp), (d, mlp), (mlp, d)]

    @property
    def layer(self) -> int:
        """Weights of the linear maps of a layer."""
        return sum(i * o for i, o in self.linears)

    @property
    def table(self) -> int:
        """Weights of the embedding, and of the head again."""
        return self.vocabulary * self.d

    @property
    def tables(self) -> int:
        return self.table * (1 if self.tied else 2)

    @property
    def weights(self) -> int:
        """All that a dense checkpoint has, without norms."""
        return self.layers * self.layer + self.tables

    def adapters(self, r: int) -> int:
        """Trained in each layer: A, B, and two norms."""
        return sum(r * (i + o) for i, o in self.linears) + 2 * self.d


SHAPES = {
    "7B": Shape(32, 4_096, 4_096, 11_008, 32_000),
    "13B": Shape(40, 5_120, 5_120, 13_824, 32_000),
    "70B": Shape(80, 8_192, 1_024, 28_672, 32_000),
    "405B": Shape(126, 16_384, 1_024, 53_248, 128_256),
}


@dataclass(frozen=True)
class Way:
    """How the weights are held: `bits` of each that is packed, 0 for dense ones in shards; whether they are drawn."""

    engine: str
    bits: int = 0
    drawn: bool = True


WAYS = {
    "PEFT LoRA, FSDP2": Way("FSDP2", drawn=False),
    "own shard, FSDP2": Way("FSDP2"),
    "packed 1 bit, DDP": Way("DDP", 1),
    "packed 4 bits, DDP": Way("DDP", 4),
}


def trained(shape: Shape, a: argparse.Namespace) -> int:
    """Elements of adapters and norms, and of the embedding where it is trained."""
    return shape.layers * shape.adapters(a.r) + shape.d + (shape.tables if a.train_embeddings else 0)


def sent_at_start(shape: Shape, way: Way, a: argparse.Namespace) -> float:
    """Bytes broadcast, or broadcast and scattered, before the first step."""
    if way.engine == "DDP":
        return trained(shape, a) * a.trained_bytes + (0 if way.drawn else shape.weights * a.weight_bytes)
    if way.drawn:
        return 0.0
    # accelerate broadcasts each entry of the state dict, a tied table twice, and scatters its shards from rank 0 again.
    whole = (shape.weights + (shape.table if shape.tied else 0)) * a.weight_bytes + trained(shape, a) * a.trained_bytes
    return 2 * whole


def gathered(shape: Shape, way: Way, a: argparse.Namespace) -> float:
    """Bytes all-gathered in a step: layers forward and backward; embedding, last norm and head once."""
    if way.engine == "DDP":
        return 0.0
    layers = shape.layers * shape.adapters(a.r) * a.trained_bytes
    tables = shape.tables * (a.trained_bytes if a.train_embeddings else a.weight_bytes)
    if way.bits:
        tables = tables if a.train_embeddings else 0.0
    else:
        layers += shape.layers * shape.layer * a.weight_bytes
    return 2 * layers + tables + shape.d * a.trained_bytes


def reduced(shape: Shape, way: Way, a: argparse.Namespace) -> float:
    """Bytes of gradients in a step: reduce-scattered under FSDP2, all-reduced under DDP."""
    return trained(shape, a) * a.trained_bytes


def held(shape: Shape, way: Way, ranks: int, a: argparse.Namespace) -> float:
    """Bytes of weights and of trained tensors that a rank has when the first step begins."""
    own = trained(shape, a) * a.trained_bytes
    frozen = shape.weights - (shape.tables if a.train_embeddings else 0)
    if way.engine == "DDP":
        return own + (frozen * way.bits / 8 if way.bits else frozen * a.weight_bytes)
    return own / ranks + (frozen * way.bits / 8 if way.bits else frozen * a.weight_bytes / ranks)


def building(shape: Shape, way: Way, ranks: int, a: argparse.Namespace) -> float:
    """Bytes of the rank that needs most while the model is built; with efficient loading the first has everything."""
    own = held(shape, way, ranks, a)
    if way.engine == "DDP" or way.drawn:
        return own
    return own + (shape.weights + (shape.table if shape.tied else 0)) * a.weight_bytes


def memory(shape: Shape, way: Way, ranks: int, a: argparse.Namespace) -> float:
    """Bytes of a rank in a step: weights, gradients, AdamW's moments, layers as they are used, activations."""
    states = trained(shape, a) * (a.trained_bytes + 8)
    layer = shape.layer * a.weight_bytes
    table = shape.table * a.weight_bytes
    if way.engine == "FSDP2":
        states /= ranks
        scratch = 2 * layer + table  # this layer and the next; the head stays until backward
    else:
        states += trained(shape, a) * a.trained_bytes  # DDP's buckets
        scratch = max(layer, table) if way.bits else 0
    tokens = a.microbatch * a.tokens
    one = (8 * shape.d + 2 * shape.kv + 4 * shape.mlp) * a.weight_bytes
    inputs = shape.layers * shape.d * a.weight_bytes
    activations = tokens * (inputs + one if a.recompute else shape.layers * one)
    logits = tokens * shape.vocabulary * (a.weight_bytes + 4)
    return held(shape, way, ranks, a) + states + scratch + activations + logits


def bandwidth(ranks: int, a: argparse.Namespace) -> float:
    """Bytes a second of a pipelined collective: of a GPU's links, or of all cards of a node where there are several."""
    return (a.intra_node if ranks <= a.node else min(a.intra_node, a.inter_node)) * GB


def start_up(shape: Shape, way: Way, ranks: int, a: argparse.Namespace) -> float:
    """Seconds until the weights are in place, without imports, compilation and CUDA, which take as long in each way."""
    sent = sent_at_start(shape, way, a)
    if not way.drawn:
        # Half is broadcast. The other half is scattered, and leaves rank 0 by its own card.
        own_card = a.intra_node if ranks <= a.node else a.inter_node / a.node
        seconds = sent / 2 / bandwidth(ranks, a) + sent / 2 * (ranks - 1) / ranks / (own_card * GB)
        return seconds + shape.weights * a.weight_bytes / (a.storage * GB)
    count = shape.weights if way.bits else shape.weights / ranks
    return sent / bandwidth(ranks, a) + count * (a.draw_base + a.draw_bit * (way.bits or 16)) * 1e-9


def communication(shape: Shape, way: Way, ranks: int, a: argparse.Namespace) -> float:
    """Seconds of a step's collectives on a ring, if nothing else ran."""
    ring, hops = (ranks - 1) / ranks / bandwidth(ranks, a), math.ceil(math.log2(ranks)) if ranks > 1 else 0
    twice = 2 if way.engine == "DDP" else 1  # an all-reduce is a reduce-scatter and an all-gather
    calls = 1 + (3 * shape.layers if way.engine == "FSDP2" else 1)
    return (gathered(shape, way, a) + twice * reduced(shape, way, a)) * ring + calls * hops * a.latency * 1e-6


def compute(shape: Shape, way: Way, a: argparse.Namespace) -> float:
    """Seconds of a step's arithmetic on one GPU, and of looking packed weights up."""
    tokens, passes = a.microbatch * a.tokens, 3 if a.recompute else 2  # no gradients of frozen weights
    matrices = 2 * tokens * (passes * shape.layers * shape.layer + 2 * shape.table)
    adapters = 2 * tokens * (passes + 1) * shape.layers * shape.adapters(a.r)
    attention = 2 * tokens * a.tokens * shape.d * (passes + 1) * shape.layers  # causal: half of 4 tokens^2 d
    seconds = (matrices + adapters + attention) / (a.tflops * 1e12 * a.utilisation)
    if way.bits:  # each pass writes the weights of a layer and reads them
        seconds += passes * shape.weights * (2 * a.weight_bytes + way.bits / 8) / (a.memory_bandwidth * GB)
    return seconds


def step(shape: Shape, way: Way, ranks: int, a: argparse.Namespace) -> float:
    """Seconds of a step: arithmetic, and the communication that it does not hide."""
    busy = compute(shape, way, a)
    return busy + max(0.0, communication(shape, way, ranks, a) - a.overlap * busy)
