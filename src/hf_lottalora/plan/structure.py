"""What a module's own code says of its layers: which ones mix tokens, and whose weights are read without a call.

Read off the source of the classes, once per class: no forward pass, so no inputs and no memory are needed.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeGuard

from torch import nn
from transformers import PreTrainedModel

# Functions by which the code of a module mixes tokens: attention, scans of state spaces, linear attention, convolution.
_MIXES = re.compile(
    r"scaled_dot_product_attention|attention_interface|flash_attn|flash_attention|flex_attention|selective_scan|_scan"
    r"|mamba_|segment_sum|delta_rule|causal_conv1d|lightning|rg_lru|wkv|mlstm"
)
_ATTENDS = re.compile(
    r"(attention|attn)(?!.*(layer|block|encoder|decoder|model|stage|list|head|merger)$)", re.IGNORECASE
)
_FUSED = re.compile(r"fast_path|cuda_kernels|kernels_forward")  # beside code that calls each layer, code that does not
_CHOOSES = re.compile(r"\btopk\(")  # routers and indexers: what they choose has no gradient
_FEEDS_FORWARD = re.compile(r"(mlp|feed_?forward|ffn)(block|layer)?$", re.IGNORECASE)
# What lies in an attention module and is no projection of tokens: positions, sinks, biases and kernels made by small
# networks, routers, and adapters that an architecture brings itself.
NO_PROJECTION = re.compile(
    r"(^|[._])(pos|rel|relative|position|positional|router|indexer|adapters?|lora|kernel|sconv|sinks?)([._]|$)"
    r"|rel_pos|cpb_mlp|^r_proj$",
    re.IGNORECASE,
)
# Looking at these of a weight does not multiply with it.
_LOOKS = {"dtype", "device", "shape", "size", "ndim", "dim", "is_meta", "requires_grad", "numel", "element_size"}
_SIZES = {"stride", "kernel_size", "padding", "dilation", "groups", "in_channels", "out_channels"}
_NOT_FORWARD = {
    "__init__",
    "_init_weights",
    "init_weights",
    "reset_parameters",
    "extra_repr",
    "tie_weights",
    "_tie_weights",
}


def token_projections(model: nn.Module) -> set[str]:
    """Paths below modules that attend or otherwise mix tokens, without what is known to be no projection there."""
    found: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention):
            found.add(path)
        elif path and _mixes_tokens(module):
            found |= {f"{path}.{below}" for below in _projections(module)}
    return found


def _mixes_tokens(module: nn.Module) -> bool:
    kind: Any = type(module)
    if isinstance(module, PreTrainedModel):
        return False
    # A lone layer under a name that says attention is a gate.
    attends = _ATTENDS.search(kind.__name__) and sum(bool(part._parameters) for part in module.modules()) > 1
    return _calls_mixer(kind) or bool(attends)


def _projections(module: nn.Module, path: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        kind: Any = type(child)
        chooses = _CHOOSES.search(_source(kind)) and not _ATTENDS.search(kind.__name__)
        feeds_forward = _FEEDS_FORWARD.search(kind.__name__) or _FEEDS_FORWARD.search(name)
        if not (chooses or feeds_forward or NO_PROJECTION.search(name)):
            yield below
            yield from _projections(child, below)


def weights_read(model: nn.Module) -> set[str]:
    """Paths of modules whose weight some other module's code reads without calling them, always or on some path.

    Of embeddings also those that are called too: a head that multiplies with their table would miss an adapter.
    """
    found = set()
    for path, module in model.named_modules(remove_duplicate=False):
        kind: Any = type(module)
        layers, tables, _ = _weights_read_by(kind)
        for below in layers | tables:
            for place, part in _below(module, below.split(".")):
                if below in layers or isinstance(part, nn.Embedding):
                    found.add(f"{path}.{place}" if path else place)
    return found


def sizes_read(model: nn.Module) -> set[str]:
    """Paths of modules of which some other module's code reads a stride or the like, or that it hands to a function."""
    found: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        kind: Any = type(module)
        for below in _weights_read_by(kind)[2]:
            found.update(f"{path}.{place}" if path else place for place, _ in _below(module, below.split(".")))
    return found


def unread_classes(model: nn.Module) -> set[str]:
    """Names of the classes whose code cannot be read, so that nothing is known of what they call."""
    kinds: set[Any] = {type(module) for module in model.modules() if len(module._modules)}
    return {kind.__name__ for kind in kinds if not kind.__module__.startswith("torch.") and not _source(kind)}


def _below(module: nn.Module, parts: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules below one that a path with stars means, with their paths."""
    if not parts:
        yield "", module
        return
    for name, child in module._modules.items():
        if child is not None and parts[0] in ("*", name):
            for place, part in _below(child, parts[1:]):
                yield f"{name}.{place}" if place else name, part


@cache
def _calls_mixer(kind: Any) -> bool:
    calls = (node.func for function in _functions(kind) for node in ast.walk(function) if isinstance(node, ast.Call))
    return any(_MIXES.search(name) for call in calls for name in _chain(call)[:1])


@cache
def _weights_read_by(kind: Any) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Paths below a module, stars for any child: of layers that an adapter would not reach; of all it looks into; of
    those whose sizes may be read.
    """
    functions = list(_functions(kind))
    readers = {function.name: _layers_read(function) for function in functions}
    read, called, multiplied, handed_on, sizes = set(), set(), set(), set(), set()
    for function in functions:
        names = _names(function)
        looked_at = {
            id(node.value) for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr in _LOOKS
        }
        for node in ast.walk(function):
            operands: list[ast.expr] = []
            if isinstance(node, ast.Call):
                called.add(_path(node.func, names))
                given: dict[Any, ast.expr] = dict(enumerate(node.args))
                given.update({keyword.arg: keyword.value for keyword in node.keywords})
                lent = readers.get(_path(node.func, names)) or _read_by_function(kind, node.func)
                multiplied |= {_path(given[at], names) for name, i in lent.items() for at in (i, name) if at in given}
                if _chain(node.func)[0] not in ("isinstance", "hasattr"):
                    operands = list(given.values())
                    handed_on |= {_path(operand, names) for operand in operands}
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
                operands = [node.left, node.right]
            elif _is_weight(node) and id(node) not in looked_at:
                read.add(_path(node.value, names))
            elif isinstance(node, ast.Attribute) and node.attr in _SIZES:
                sizes.add(_path(node.value, names))
            multiplied |= {_path(operand.value, names) for operand in operands if _is_weight(operand)}
    # Where code calls a layer and also looks into its weight, only products and kernels with the whole weight count.
    past = (read if _FUSED.search(_source(kind)) else read - called) | multiplied
    return frozenset(past - {""}), frozenset((read | handed_on) - {""}), frozenset((sizes | handed_on) - {""})


def _names(function: ast.FunctionDef) -> dict[str, str]:
    """What names in a method stand for, as paths below its module: itself, parts of it, and loops over them."""
    names = {function.args.args[0].arg: ""} if function.args.args else {}
    for node in ast.walk(function):
        target, value, star = None, None, ""
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
        elif isinstance(node, (ast.For, ast.comprehension)):
            target, value, star = node.target, node.iter, ".*"
        if isinstance(target, ast.Name) and value is not None and (path := _path(value, names)):
            names[target.id] = path + star
    return names


def _layers_read(function: ast.FunctionDef) -> dict[str, int]:
    """The arguments of which a method reads the weight, by name with their positions."""
    names = [argument.arg for argument in function.args.args if argument.arg not in ("self", "cls")]
    weights = (node.value for node in ast.walk(function) if _is_weight(node))
    return {node.id: names.index(node.id) for node in weights if isinstance(node, ast.Name) and node.id in names}


@cache
def _function_reads(function: Any) -> dict[str, int]:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    return _layers_read(tree) if isinstance(tree, ast.FunctionDef) else {}


def _read_by_function(kind: Any, called: ast.expr) -> dict[str, int]:
    """As `_layers_read`, of a function that the module of a class knows by this name."""
    if isinstance(called, ast.Name):
        for base in kind.__mro__:
            function = getattr(sys.modules.get(base.__module__), called.id, None)
            if inspect.isfunction(function) and not function.__module__.startswith("torch."):
                return _function_reads(function)
    return {}


def _is_weight(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and node.attr == "weight"


def _path(node: ast.expr, names: dict[str, str]) -> str:
    """The path of `self.a.b`, or of what a name stands for, below a method's module; "" for anything else."""
    *parts, root = _chain(node)
    if root not in names:
        return ""
    return ".".join(part for part in (names[root], *reversed(parts)) if part)


def _functions(kind: Any) -> Iterator[ast.FunctionDef]:
    source = _source(kind)
    for node in ast.walk(ast.parse(source)) if source else ():
        if isinstance(node, ast.FunctionDef) and node.name not in _NOT_FORWARD:
            yield node


def _chain(node: ast.expr) -> list[str]:
    """`self.a[i].b` as ["b", "*", "a", "self"], [..., ""] for what is no such chain."""
    parts = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        parts.append(node.attr if isinstance(node, ast.Attribute) else "*")
        node = node.value
    return [*parts, node.id if isinstance(node, ast.Name) else ""]


@cache
def _source(kind: Any) -> str:
    """The code of a class and of those it inherits from, without torch's own; "" where there is none to read."""
    sources = []
    for base in kind.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        if base.__name__ in ("PreTrainedModel", "GenerationMixin"):
            break
        try:
            sources.append(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # made at run time
            continue
    return "\n".join(sources)
