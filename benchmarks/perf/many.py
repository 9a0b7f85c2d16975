"""Many adapters over one scaffold: memory, loading and switching, against PEFT's LoRA over one base and dense models.

A small Llama in float32, r = 8 on q and v, in one process. Each way gets the same number of adapters, or models, from
files; then one switches to each in turn, and one batch has a row for each of 32.

- `LottaLoRA`: `load_adapter` and `set_adapter` over one scaffold; embeddings and norms frozen, as in PEFT's LoRA;
- `LottaLoRA, trained norms`: each adapter with its own norms, too;
- `PEFT LoRA`: the same with `LoraConfig` over one base;
- `checkpoints`: so many dense models, loaded and copied to memory of their own. Switching is loading the next one, as
  where memory has room for one.

Memory is the growth of RSS while they are loaded, and what their tensors take; milliseconds are medians, of switching
and of the batch in pairs, of loading over the last quarter, which has most adapters in place.

    python benchmarks/perf/many.py                    # 100 adapters: three minutes on two cores
    python benchmarks/perf/many.py --adapters 5 --repeats 1
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shared import RESULTS, SCALES, VOCABULARY, build, memory, paired, ratio, record, seconds
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LottaLoRA": ("ours", {}),
    "LottaLoRA, trained norms": ("ours", {"norms": "train"}),
    "PEFT LoRA": ("peft", {}),
}
DENSE = "checkpoints"


def held(models: list[nn.Module]) -> int:
    """Bytes of all parameters."""
    return sum({id(p): p.nbytes for model in models for p in model.parameters()}.values())


def load_all(load: Callable[[int], nn.Module], number: int) -> dict[str, float]:
    """Load so many, and say what one of them takes."""
    loaded = [load(0)]  # with what is made once, such as the base
    before, tensors, times = memory("VmRSS"), held(loaded), []
    for index in tqdm(range(1, number + 1), leave=False, unit="loaded"):
        times.append(seconds(lambda: loaded.append(load(index))))  # noqa: B023
    return {
        "RSS MiB each": (memory("VmRSS") - before) / number / 2**20,
        "tensors MiB each": (held(loaded) - tensors) / number / 2**20,
        "load ms": 1e3 * statistics.median(times[-(-3 * number // 4) - 1 :]),
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
    switches: dict[str, Callable[[], object]] = {}
    batches: dict[str, Callable[[], object]] = {}
    rows = min(32, args.adapters)
    batch = torch.randint(0, VOCABULARY, (rows, 16), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        for way, (kind, options) in ADAPTERS.items():
            model: Any = build(kind, args.scale, torch.float32, target_modules=["q_proj", "v_proj"], **options).eval()
            folder = Path(name, way)
            model.save_pretrained(folder)

            def load(index: int, model: Any = model, folder: Path = folder) -> nn.Module:
                model.load_adapter(folder, f"a{index}")
                return model

            def switch(model: Any = model, turn: Any = itertools.cycle(range(args.adapters))) -> None:  # noqa: B008
                model.set_adapter(f"a{next(turn)}")

            def mixed(model: Any = model) -> None:
                with torch.no_grad():
                    model(input_ids=batch, adapter_names=[f"a{index}" for index in range(rows)])

            found[way] = load_all(load, args.adapters)
            switches[way], batches[way] = switch, mixed
        folder = Path(name, DENSE)
        build("full", args.scale, torch.float32).save_pretrained(folder)

        def checkpoint(_: int = 0) -> nn.Module:
            dense = AutoModelForCausalLM.from_pretrained(folder)
            for parameter in dense.parameters():
                parameter.data = parameter.data.clone()
            return dense

        found[DENSE], switches[DENSE] = load_all(checkpoint, args.adapters), checkpoint
        times, times_mixed = paired(switches, args.repeats), paired(batches, args.repeats)
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
