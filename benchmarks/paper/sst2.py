"""GLUE SST-2 from scratch: how close does LottaLoRA come to training every weight, and what does each part add?

A small BERT (4 layers, d = 256, 4 heads, FFN 1024, no pretrained weights) is trained for one epoch on the whole
training set, for three seeds, in each of these ways:

- `full`: every weight is trained, from the architecture's own initialisation;
- `lottalora`: the default `LottaLoraConfig` with r = 8;
- `zero`: the same over a scaffold of zeros: frozen layers pass nothing on, the adapters are on their own. Two things
  are changed in its favour, since it would not learn at all otherwise: the pooler gets an adapter, and both A and B
  start random (with W = 0 and B = 0, value and output projection multiply to zero and so do their gradients);
- `head`: the same scaffold as `lottalora`, but adapters and beta stay as they start: only embeddings, norms and head
  are trained;
- `lottalora-frozen`, `head-frozen`: the same two with embeddings frozen as they are drawn. Embeddings are most of so
  small a network, and a bag of words goes a long way on SST-2: this is what adapters do without them.

The same learning rates are tried for each, on training rows alone: 2,000 of them are set aside to choose by. The
validation set is used once per final run. Settings are otherwise equal: AdamW, weight decay 0.01, cosine after 6 %
linear warm-up, dropout 0.1, bfloat16 autocast (`--precision float32` turns it off).

    python benchmarks/paper/sst2.py --data_dir DIR     # DIR/glue/sst2/*.parquet and DIR/tokenizers/bert-base-uncased
    python benchmarks/paper/sst2.py --quick            # seconds, to see that it runs

Without `--data_dir` or the environment variable LOTTALORA_DATA, data and tokenizer come from the Hugging Face hub.
Every finished run is in the result file at once, and is not run again when the command is repeated.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import hf_lottalora  # isort: skip  # first: it registers the method with PEFT
import numpy as np
import torch
from cli import RESULTS as FOLDER
from cli import environment, read_json, write_json
from datasets import Dataset, load_dataset
from peft import get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

METHODS = {
    "full": "every weight trained",
    "lottalora": "drawn scaffold, r = {rank} adapters",
    "zero": "zero scaffold, r = {rank} adapters",
    "head": "drawn scaffold, adapters not trained",
    "lottalora-frozen": "`lottalora`, embeddings frozen",
    "head-frozen": "`head`, embeddings frozen",
}
ARCHITECTURE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": 64,
}
ZERO = {
    "family": "zero",
    "init_lora_weights": False,
    "target_modules": ["query", "key", "value", "attention.output.dense", "pooler.dense"],
}
DEV_ROWS = 2000
RESULTS = FOLDER / "sst2.json"


@dataclass
class Data:
    """SST-2, tokenised: the training set, and the same one split in two to choose learning rates by."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    validation: Dataset
    search_train: Dataset
    search_dev: Dataset


def load_data(args: argparse.Namespace) -> Data:
    """Read, tokenise and split; the split depends on nothing but the number of rows."""
    if args.data_dir:
        folder = Path(args.data_dir)
        files = {split: str(folder / "glue" / "sst2" / f"{split}.parquet") for split in ("train", "validation")}
        missing = [file for file in files.values() if not Path(file).is_file()]
        if missing:
            raise SystemExit(f"--data_dir {folder}: {', '.join(missing)} not found.")
        raw = load_dataset("parquet", data_files=files)
        tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizers" / "bert-base-uncased"))
    else:
        raw = load_dataset("nyu-mll/glue", "sst2")
        tokenizer = AutoTokenizer.from_pretrained("google-bert/bert-base-uncased")
    if args.quick:
        raw["train"] = raw["train"].select(range(DEV_ROWS + 512))
    columns = [name for name in raw["train"].column_names if name != "label"]
    rows = raw.map(
        lambda batch: tokenizer(batch["sentence"], truncation=True, max_length=args.max_seq_length),
        batched=True,
        remove_columns=columns,
        desc="tokenising",
    )
    order = np.random.default_rng(0).permutation(len(rows["train"]))
    search = order[DEV_ROWS:][: args.search_rows or None]
    train, dev = rows["train"], rows["train"].select(order[:DEV_ROWS])
    if args.quick:
        train = train.select(range(512))
    return Data(tokenizer, train, rows["validation"], rows["train"].select(search), dev)


def build_model(method: str, seed: int, rank: int, vocab_size: int, **changed: Any) -> nn.Module:
    """The same architecture for every method; `seed` is the scaffold's, or that of the ordinary initialisation.

    `changed` are other options of the `LottaLoraConfig`.
    """
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=vocab_size, **ARCHITECTURE))
    if method == "full":
        return model
    kind, _, frozen = method.partition("-")
    options = {**(ZERO if kind == "zero" else {}), "embeddings": "frozen" if frozen else "train"}
    options = {"seed": seed, "r": rank, "task_type": "SEQ_CLS", "decay_beta": True, **options, **changed}
    config = hf_lottalora.LottaLoraConfig(**options)
    model = get_peft_model(model, config)
    if kind == "head":
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(False)
    return model


def run(
    method: str,
    seed: int,
    learning_rate: float,
    train: Dataset,
    test: Dataset,
    data: Data,
    args: argparse.Namespace,
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """Train one model, the method's or this one, and score it; all but method, seed and learning rate is fixed."""
    model = model or build_model(method, seed, args.rank, len(data.tokenizer))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Embeddings are most of a small BERT, and every method trains them.
    embeddings = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "_embeddings." in n)
    with tempfile.TemporaryDirectory() as folder:
        training_args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=128,
            learning_rate=learning_rate,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=0.06,
            use_cpu=not torch.accelerator.is_available(),
            bf16=args.precision == "bfloat16",
            train_sampling_strategy="group_by_length",
            seed=seed,
            save_strategy="no",
            logging_steps=100,
            report_to="none",
            disable_tqdm=not sys.stderr.isatty(),
        )
        trainer = Trainer(
            model=model,
            args=training_args,
            train_dataset=train,
            eval_dataset=test,
            data_collator=DataCollatorWithPadding(data.tokenizer),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )
        start = time.perf_counter()
        loss = trainer.train().training_loss
        seconds = time.perf_counter() - start
        accuracy = trainer.evaluate()["eval_accuracy"]
    return {
        "method": method,
        "seed": seed,
        "learning_rate": learning_rate,
        "accuracy": accuracy,
        "train_loss": loss,
        "train_seconds": round(seconds, 1),
        "train_rows": len(train),
        "test_rows": len(test),
        "trainable_parameters": trainable,
        "trainable_outside_embeddings": trainable - embeddings,
    }


def summarise(runs: dict[str, dict[str, Any]], chosen: dict[str, float]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation per method over its final runs, and the ratio to `full`."""
    summary: dict[str, dict[str, float]] = {}
    for method, rate in chosen.items():
        found = [run for key, run in runs.items() if key.startswith(f"final/{method}/lr={rate:g}/")]
        if found:
            scores = [run["accuracy"] for run in found]
            summary[method] = {
                "mean": mean(scores),
                "std": stdev(scores) if len(scores) > 1 else 0.0,
                "runs": len(scores),
                "learning_rate": rate,
                "train_seconds": mean(run["train_seconds"] for run in found),
                "trainable_parameters": found[0]["trainable_parameters"],
                "trainable_outside_embeddings": found[0]["trainable_outside_embeddings"],
            }
    if "full" in summary:
        for row in summary.values():
            row["ratio_to_full"] = row["mean"] / summary["full"]["mean"]
    return summary


def table(summary: dict[str, dict[str, float]], rank: int) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| method | | learning rate | trained, besides embeddings | accuracy | of full | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, row in summary.items():
        lines.append(
            f"| `{method}` | {METHODS[method].format(rank=rank)} | {row['learning_rate']:g} "
            f"| {row['trainable_outside_embeddings']:,} | {row['mean']:.2%} +- {row['std']:.2%} "
            f"| {row.get('ratio_to_full', float('nan')):.1%} | {row['train_seconds']:.0f} |"
        )
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    description, _, _ = (__doc__ or "").partition("    python")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", default=os.environ.get("LOTTALORA_DATA"), help="default: $LOTTALORA_DATA, or the hub")
    add("--output", type=Path, help=f"result file, also read to go on (default: {RESULTS.name})")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of scaffold and training (default: 0 1 2)")
    add("--learning_rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2], help="tried for each")
    add("--rank", type=int, default=8, help="rank of the adapters (default: 8)")
    add("--epochs", type=float, default=1.0)
    add("--batch_size", type=int, default=64)
    add("--max_seq_length", type=int, default=64)
    add("--search_rows", type=int, default=0, help="training rows to choose by (default: all but 2,000)")
    add("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="autocast or not")
    add("--quick", action="store_true", help="smoke run: 512 rows, one seed, two rates, not kept")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.learning_rates = args.seeds[:1], args.learning_rates[:2]
    args.output = args.output or (Path(tempfile.gettempdir()) / "sst2-quick.json" if args.quick else RESULTS)
    return args


def main() -> None:
    args = parse_args()
    logging.set_verbosity_error()
    data = load_data(args)
    settings = {
        **{name: getattr(args, name) for name in ("rank", "epochs", "batch_size", "max_seq_length", "search_rows")},
        "precision": args.precision,
        "quick": args.quick,
        "architecture": ARCHITECTURE,
    }
    result = read_json(args.output) or {"settings": settings, "runs": {}}
    if result["settings"] != settings:
        raise SystemExit(f"{args.output} holds runs with other settings: {result['settings']}. Pass another --output.")
    runs, chosen = result["runs"], result.setdefault("chosen_learning_rates", {})
    result["environment"] = environment()

    def cell(phase: str, method: str, rate: float, seed: int, *sets: Dataset) -> dict[str, Any]:
        key = f"{phase}/{method}/lr={rate:g}/seed={seed}"
        if key not in runs:
            runs[key] = run(method, seed, rate, *sets, data, args)
            write_json(args.output, result)
            tqdm.write(f"{key}: accuracy {runs[key]['accuracy']:.4f}, {runs[key]['train_seconds']} s")
        bar.update()
        return runs[key]

    with tqdm(total=len(args.methods) * (len(args.learning_rates) + len(args.seeds)), desc="runs") as bar:
        for method in args.methods:
            sets, seed = (data.search_train, data.search_dev), args.seeds[0]
            tried = [cell("search", method, rate, seed, *sets) for rate in args.learning_rates]
            chosen[method] = max(tried, key=lambda run: run["accuracy"])["learning_rate"]
        for seed in args.seeds:
            for method in args.methods:
                cell("final", method, chosen[method], seed, data.train, data.validation)
                result["summary"] = summarise(runs, chosen)
                write_json(args.output, result)
    print(table(result["summary"], args.rank))


if __name__ == "__main__":
    main()
