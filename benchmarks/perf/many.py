"""Many adapters over one scaffold: memory, loading and switching, against PEFT's LoRA over one base and dense models.

A small Llama in float32, r = 8 on q and v, in one process. Each way gets the same number of adapters, or models, from
files; then one switches to each in turn, and one batch has a row for each of 32.

- `LottaLoRA`: `load_adapter` and `set_adapter` over one scaffold; embeddings and norms frozen, as in PEFT's LoRA;
- `LottaLoRA, trained norms`: each adapter with its own norms, too;
- `PEFT LoRA`: the same with `LoraConfig` over one base;
- `checkpoints`: so many dense models, loaded and copied to memory of their own. Switching is loading the next one, as
  where memory has room for one.

Memory is the growth of RSS while a fifth as many are loaded in a process of its own, and what their tensors take.
Milliseconds are medians, of switching and of the batch in pairs, of loading over the last quarter, when most are there.

    python benchmarks/perf/many.py                    # 100 adapters: three minutes on two cores
    python benchmarks/perf/many.py --adapters 5 --repeats 1
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from shared import RESULTS, SCALES, VOCABULARY, build, memory, paired, ratio, record, seconds
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LottaLoRA": ("ours", {}),
    "LottaLoRA, trained norms": ("ours", {"norms": "train"}),
    "PEFT LoRA": ("peft", {}),
}
DENSE = "checkpoints"


def loader(way: str, scale: str, folder: Path) -> Callable[[int], Any]:
    """A function that loads one more adapter, or dense model, and returns the model."""
    kind, options = ADAPTERS.get(way, ("full", {}))
    model: Any = build(kind, scale, torch.float32, target_modules=["q_proj", "v_proj"], **options)
    model.eval().save_pretrained(folder)

    def adapter(index: int) -> Any:
        model.load_adapter(folder, f"a{index}")
        return model

    def checkpoint(index: int) -> Any:
        dense = AutoModelForCausalLM.from_pretrained(folder)
        for parameter in dense.parameters():
            parameter.data = parameter.data.clone()
        return dense

    return checkpoint if way == DENSE else adapter


def growth(way: str, scale: str, number: int) -> dict[str, float]:
    """MiB for each of so many, after one that brings what is made once."""

    def held() -> int:
        return sum({id(p): p.nbytes for model in loaded for p in model.parameters()}.values())

    with tempfile.TemporaryDirectory() as folder:
        load = loader(way, scale, Path(folder))
        loaded = [load(0)]
        gc.collect()
        rss, tensors = memory("VmRSS"), held()
        loaded.extend(load(index) for index in range(1, number + 1))
        gc.collect()
        return {
            "RSS MiB each": (memory("VmRSS") - rss) / number / 2**20,
            "tensors MiB each": (held() - tensors) / number / 2**20,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="3M", help="default: 3M")
    add("--adapters", type=int, default=100, help="default: 100")
    add("--repeats", type=int, default=21, help="default: 21")
    add("--output", default=RESULTS / "many.json", help="JSON file; other settings in it are kept")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for way in (*ADAPTERS, DENSE):  # each in a process of its own, which has freed nothing before
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
            found[way] = pool.submit(growth, way, args.scale, max(2, args.adapters // 5)).result()
    switches: dict[str, Callable[[], object]] = {}
    batches: dict[str, Callable[[], object]] = {}
    rows = min(32, args.adapters)
    batch = torch.randint(0, VOCABULARY, (rows, 16), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        for way in ADAPTERS:
            load = loader(way, args.scale, Path(name, way))
            loading = [seconds(partial(load, index)) for index in tqdm(range(args.adapters), desc=way, unit="adapter")]
            found[way]["load ms"] = 1e3 * statistics.median(loading[3 * args.adapters // 4 :])
            model = load(args.adapters)

            def switch(model: Any = model, turn: Any = itertools.cycle(range(args.adapters))) -> None:  # noqa: B008
                model.set_adapter(f"a{next(turn)}")

            def mixed(model: Any = model) -> None:
                with torch.no_grad():
                    model(input_ids=batch, adapter_names=[f"a{index}" for index in range(rows)])

            switches[way], batches[way] = switch, mixed
        switches[DENSE] = partial(loader(DENSE, args.scale, Path(name, DENSE)), 0)
        times, times_mixed = paired(switches, args.repeats), paired(batches, args.repeats)
    found[DENSE]["load ms"] = 1e3 * statistics.median(times[DENSE])
    table = []
    for way, row in found.items():
        line = {"way": way, **row, "switch ms": 1e3 * statistics.median(times[way])}
        line["over PEFT LoRA"] = ratio(times, way, "PEFT LoRA")
        line[f"batch of {rows} ms"] = 1e3 * statistics.median(times_mixed[way]) if way in times_mixed else ""
        line["batch over PEFT LoRA"] = ratio(times_mixed, way, "PEFT LoRA") if way in times_mixed else ""
        table.append(line)
    record(args.output, f"{args.adapters} of {args.scale}", table, repeats=args.repeats)


if __name__ == "__main__":
    main()
