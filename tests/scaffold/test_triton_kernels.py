"""The GPU kernels, in Triton's interpreter where there is no GPU: the CPU's values to the bit, and the equation."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tiny import config, ids, llama, perturb

from hf_lottalora import ScaffoldTensor
from hf_lottalora.residency import virtual_weight
from hf_lottalora.residency.forms import VirtualWeight, resident
from hf_lottalora.scaffold import gpu
from hf_lottalora.scaffold.draw import draw_words, stream_key
from hf_lottalora.scaffold.tensor import draw_into

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAMILIES = {1: "binary", 2: "normal_2bit", 4: "normal_4bit", 8: "normal_8bit", 16: "normal"}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels, in use on the device of these tests."""
    monkeypatch.setattr(gpu, "DEVICE_TYPES", (DEVICE.type,))
    return gpu.kernels_for(DEVICE)


def on_cpu(scaffold: ScaffoldTensor, dtype: torch.dtype) -> torch.Tensor:
    """Its values as NumPy's stream gives them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "DEVICE_TYPES", ())
        return scaffold.draw(dtype)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from(list(FAMILIES)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    starts=st.lists(st.integers(0, 4_000), min_size=1, max_size=3),
    length=st.integers(1, 1_000),
    zero_row=st.none() | st.integers(0, 9),
    held=st.booleans(),
)
def test_runs_are_those_of_the_whole(
    bits: int, dtype: torch.dtype, starts: list[int], length: int, zero_row: int | None, held: bool
) -> None:
    scaffold = ScaffoldTensor("a.weight", (10, 500), 3, FAMILIES[bits], 0.5, zero_row)
    words = virtual_weight.pack(scaffold, DEVICE) if held else None
    out = torch.zeros(len(starts), length, dtype=dtype, device=DEVICE)
    scaffold.fill(starts, out, words)
    whole = on_cpu(scaffold, dtype).flatten()
    for run, start in zip(out.cpu(), starts, strict=True):
        assert torch.equal(run[: 5_000 - start], whole[start : start + length])


@pytest.mark.parametrize("bits", FAMILIES)
def test_several_programs_draw_a_tensor(bits: int) -> None:
    scaffold = ScaffoldTensor("a.weight", (7, 5_001), 3, FAMILIES[bits])
    target = torch.zeros(7, 5_001, dtype=torch.bfloat16, device=DEVICE)
    scaffold.fill([0], target.view(1, -1))
    assert torch.equal(target.cpu(), on_cpu(scaffold, torch.bfloat16))


def test_rows_of_a_table_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids stay on the device, as a CUDA graph needs."""
    scaffold = ScaffoldTensor("a.weight", (50, 6), 3, "normal_4bit", 0.5, zero_row=3)
    ids = torch.tensor([[3, 49, 0], [7, 7, 3]], device=DEVICE, dtype=torch.int32)
    expected = on_cpu(scaffold, torch.float32)[ids.cpu()]
    weight = resident(scaffold, "packed", torch.float32, DEVICE)
    for name in ("tolist", "item", "cpu", "unique", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *args, name=name: pytest.fail(f"waited for by {name}"))
    rows = torch.nn.functional.embedding(ids, weight, 3)
    monkeypatch.undo()
    assert torch.equal(rows.cpu(), expected)


def test_words_are_numpys() -> None:
    scaffold = ScaffoldTensor("a.weight", (33, 1_000), 1 << 63, "normal_4bit")
    words = virtual_weight.pack(scaffold, DEVICE).cpu().numpy().view("<u8")
    assert np.array_equal(words, draw_words(stream_key(1 << 63, "a.weight"), len(words)))


def test_drawing_counts_as_a_write() -> None:
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    weight = torch.ones(3, device=DEVICE)
    y = (x * weight).sum()
    draw_into({ScaffoldTensor("a", (3,), 1): weight})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("bits", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("parts", ["all", "weight alone"])
def test_product_of_a_few_rows(bits: int, dtype: torch.dtype, rows: int, parts: str, kernels: Any) -> None:
    """Against the equation in float64; 50 outputs and 160 inputs fill no block."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    scaffold = ScaffoldTensor("a.weight", (50, 160), 3, FAMILIES[bits], 0.08)
    weight = resident(scaffold, "packed", dtype, DEVICE)
    assert isinstance(weight, VirtualWeight) and weight.words is not None
    x, hidden, B = randn(rows, 160).to(dtype), randn(rows, 5).to(dtype), randn(50, 5)
    beta, bias = torch.tensor([1.3], device=DEVICE), randn(50)
    expected = x.double() @ weight.dense().double().t()
    options: tuple[Any, ...] = ()
    if parts == "all":
        options = (beta, bias, hidden, B, 0.7)
        expected = 1.3 * expected + 0.7 * hidden.double() @ B.double().t() + bias.double()
    y = kernels.packed_linear(x, weight.words, scaffold.table_on(dtype, DEVICE), 50, *options)
    assert y.dtype == dtype and y.shape == (rows, 50)
    # Summed in float32 and rounded once; the interpreter truncates to bfloat16.
    tolerance = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    assert (y.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("family", ["binary", "normal_4bit"])
def test_a_packed_model_decodes_by_the_kernel(family: str, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and tied head, one token and sixteen rows; more rows, and shapes it does not take, go the general way."""
    calls = []
    product = kernels.packed_linear
    monkeypatch.setattr(kernels, "packed_linear", lambda *args: calls.append(args) or product(*args))
    settings = {"embeddings": "lora", "target_modules": "all-linear", "family": family}
    packed = get_peft_model(llama(), config(**settings, residency="packed")).to(DEVICE).eval()
    dense = get_peft_model(llama(), config(**settings)).to(DEVICE).eval()
    perturb(packed)
    perturb(dense)
    taken = 15 if family == "normal_4bit" else 13  # 48 inputs of one bit are no whole number of 32-bit words
    for rows, length, count in ((1, 1, taken), (2, 8, taken), (3, 7, 0)):
        tokens = ids(rows, length).to(DEVICE)
        calls.clear()
        with torch.no_grad():
            torch.testing.assert_close(packed(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)
        assert len(calls) == count
    with packed.disable_adapter(), dense.disable_adapter(), torch.no_grad():
        token = ids(1, 1).to(DEVICE)
        torch.testing.assert_close(packed(token).logits, dense(token).logits, rtol=1e-4, atol=1e-5)
    assert len(calls) == taken


def test_without_triton_the_cpu_draws_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    gpu._has_triton.cache_clear()
    with pytest.warns(UserWarning, match="Triton is not installed, so scaffolds are drawn on the CPU"):
        assert gpu.kernels_for(DEVICE) is None
    gpu._has_triton.cache_clear()


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from hf_lottalora.scaffold import triton_kernels as kernels

def build(kernel, types, **constants):
    names = kernel.arg_names
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    assert list(signature) == names, (signature, names)
    places = {(names.index(name),): value for name, value in constants.items()}
    built = compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32))
    assert len(built.asm["cubin"]) > 0

for bits, dtype in ((1, "bf16"), (4, "fp16"), (16, "fp32"), (64, "i64")):
    drawn = [f"*{dtype}", f"*{dtype}", "*i64", "*i64", "u64", "u64", "i32", "i32", "i32", "i64"]
    build(kernels.draw_kernel, drawn, BITS=bits, HELD=bits == 4, BLOCKS=32)
for bits, dtype in ((1, "bf16"), (4, "fp16"), (16, "fp32")):
    types = [f"*{dtype}", f"*{dtype}", "*i32", f"*{dtype}", "*fp32", f"*{dtype}", f"*{dtype}", "*fp32"]
    sizes = {"ROWS": 16, "OUTPUTS": 16, "INPUTS": 128, "WIDEN": False}
    types += ["i32", "i32", "i32", "i32", "fp32"]
    build(kernels.packed_linear_kernel, types, BITS=bits, HAS_BETA=True, HAS_BIAS=True, RANK=16, **sizes)
print("compiled")
"""


@pytest.mark.smoke
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """Down to machine code, which needs no GPU: what the interpreter takes, the compiler might not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    script = tmp_path / "build.py"
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr
