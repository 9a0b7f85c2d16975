"""What a smaller artifact costs: the 3M Llama of the paper (section 5), trained on WikiText-2, saved in each dtype.

Each model is trained once, saved exactly and in float16, bfloat16 and int8, and each artifact is loaded again, from
nothing else, to be evaluated on the first 16,384 tokens of the validation text. Three ways to treat embeddings:

- `trained`: tied to the head and trained whole, with weight decay 0.1, as in the paper;
- `lora`: tied, drawn and adapted;
- `untied`: trained, not tied, without weight decay, so that rows of tokens that do not occur stay as drawn.

r = 8, alpha = 16, adapters on q, k, v and o, as in the paper. Other than there: WikiText-2 in BERT's vocabulary of
30,522, and 120 steps of 1,024 tokens at a learning rate of 3e-3 instead of 34,429 of 4,096 at 1e-4.

    python benchmarks/paper/saved_dtypes.py                  # DIR/wikitext-2 and DIR/tokenizers/bert-base-uncased
    python benchmarks/paper/saved_dtypes.py --quick          # seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import gzip
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from cli import RESULTS as FOLDER
from cli import environment, new_parser, write_json

import hf_lottalora  # isort: skip  # first: it registers the method with PEFT
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from sizes import architecture
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM, get_cosine_schedule_with_warmup

RESULTS = FOLDER / "saved_dtypes.json"
WAYS: dict[str, dict[str, Any]] = {
    "trained": {"tied": True, "embeddings": "train", "weight_decay": 0.1},
    "lora": {"tied": True, "embeddings": "lora", "weight_decay": 0.1},
    "untied": {"tied": False, "embeddings": "train", "weight_decay": 0.0},
}
DTYPES = (None, "float16", "bfloat16", "int8")
SEED, ROWS, LENGTH, EVALUATED = 42, 8, 128, 16_384


def tokens_of(args: argparse.Namespace, part: str, tokenizer: Any, most: int | None = None) -> torch.Tensor:
    """Token ids of a part of WikiText-2, in rows of `LENGTH`."""
    with gzip.open(args.data_dir / "wikitext-2" / f"{part}.txt.gz", "rt", encoding="utf-8") as file:
        lines = [line for line in file.read().splitlines() if line.strip()]
    if args.quick:
        lines, most = lines[:200], 2048
    ids = [token for line in tokenizer(lines, add_special_tokens=False)["input_ids"] for token in line]
    ids = ids[: most or len(ids)]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def build_network(way: str, vocabulary: int) -> LlamaForCausalLM:
    """The 3M Llama, without adapters."""
    config = architecture("3M")
    config.vocab_size, config.tie_word_embeddings = vocabulary, WAYS[way]["tied"]
    return LlamaForCausalLM(config)


def adapted(network: LlamaForCausalLM, way: str, **changed: Any) -> PeftModel:
    """The network with adapters; `changed` are other options of the `LottaLoraConfig`."""
    options = {"seed": SEED, "r": 8, "lora_alpha": 16, "embeddings": WAYS[way]["embeddings"], "task_type": "CAUSAL_LM"}
    return get_peft_model(network, hf_lottalora.LottaLoraConfig(**{**options, **changed}))


def train(way: str, ids: torch.Tensor, args: argparse.Namespace, model: nn.Module, seed: int = SEED) -> None:
    """So many steps."""
    decay = WAYS[way]["weight_decay"]
    adapters = isinstance(model, PeftModel)
    groups: Any = hf_lottalora.parameter_groups(model, args.lr, decay) if adapters else model.parameters()
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(ids), generator=generator) for _ in range(args.steps * ROWS // len(ids) + 1)])
    for step in tqdm(range(args.steps), desc=way, unit="step"):
        batch = ids[order[step * ROWS : (step + 1) * ROWS]]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: nn.Module, ids: torch.Tensor) -> float:
    """Cross-entropy per token, in nats."""
    losses = [float(model.eval()(input_ids=batch, labels=batch).loss) * len(batch) for batch in ids.split(ROWS)]
    return sum(losses) / len(ids)


def saved(model: PeftModel, dtype: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Size of the artifact in a dtype, and the loss of what is loaded from it."""
    model.peft_config["default"].save_dtype = dtype
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = hf_lottalora.AutoLottaLoraModelForCausalLM.from_pretrained(folder)
        file = Path(folder, "adapter_model.safetensors")
        table = "base_model.model.model.embed_tokens.weight"
        with safe_open(file, framework="pt") as tensors:
            rows = tensors.get_slice(table).get_shape()[0] if table in tensors.keys() else 0  # noqa: SIM118
        errors = {} if dtype is None else hf_lottalora.saving_loss(model, dtype)
        return {
            "bytes": file.stat().st_size,
            "loss": evaluate(again, ids),
            "rows_of_embeddings": rows,
            "relative_errors": {group: error.relative for group, error in errors.items()},
        }


def table(runs: dict[str, Any]) -> str:
    """Sizes and losses, as Markdown."""
    columns = ("bytes", "rows of the table", "loss", "more than exact", "error of A and B", "of embeddings")
    lines = [f"| embeddings | saved in | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for way, run in runs.items():
        for dtype, one in run["saved"].items():
            more = "" if dtype == "exact" else f"{one['loss'] - run['saved']['exact']['loss']:+.6f}"
            errors = [one["relative_errors"].get(group) for group in ("A and B", "embeddings")]
            shown = " | ".join("" if error is None else f"{100 * error:.2g} %" for error in errors)
            size = f"{one['bytes']:,} | {one['rows_of_embeddings']:,}"
            lines.append(f"| `{way}` | {dtype} | {size} | {one['loss']:.4f} | {more} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--data_dir", type=Path, help="holds wikitext-2 and tokenizers (default: $LOTTALORA_DATA, or ../shared/data)")
    add("--output", type=Path, default=RESULTS, help=f"result file (default: {RESULTS.name})")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    add("--steps", type=int, default=120, help="default: 120")
    add("--lr", type=float, default=3e-3, help="default: 3e-3")
    add("--threads", type=int, default=2, help="of torch (default: 2)")
    add("--quick", action="store_true", help="smoke run: 2,048 tokens, three steps, not recorded")
    args = parser.parse_args()
    args.data_dir = args.data_dir or Path(os.environ.get("LOTTALORA_DATA") or "../shared/data")
    if args.quick:
        args.steps = 3
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(str(args.data_dir / "tokenizers" / "bert-base-uncased"))
    args.vocabulary = len(tokenizer)
    training = tokens_of(args, "train", tokenizer)
    validation = tokens_of(args, "valid", tokenizer, EVALUATED)
    result: dict[str, Any] = {
        "environment": environment(),
        "settings": {"steps": args.steps, "lr": args.lr, "tokens": ROWS * LENGTH, "vocabulary": args.vocabulary},
        "runs": {},
    }
    for way in args.ways:
        start = time.perf_counter()
        model = adapted(build_network(way, args.vocabulary), way)
        train(way, training, args, model)
        seconds = round(time.perf_counter() - start)
        of = {dtype or "exact": saved(model, dtype, validation) for dtype in DTYPES}
        result["runs"][way] = {"seconds": seconds, "loss_in_memory": evaluate(model, validation), "saved": of}
        if not args.quick:
            write_json(args.output, result)
    print(table(result["runs"]))


if __name__ == "__main__":
    main()
