"""Run by test_zero.py under torchrun: training under DeepSpeed. Writes what each rank has found to a JSON file."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import engines
from fsdp2_worker import OPTIONS, ROWS, UntilTheFirstStep, losses
from peft import PeftModel, get_peft_model
from tiny import bert, config, ids, llama
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from hf_lottalora.paths import owner_of
from hf_lottalora.residency.partitions import is_partitioned
from hf_lottalora.residency.shards import local_part
from hf_lottalora.residency.virtual_weight import VirtualWeight

MODES = {"zero2": 2, "zero3": 3, "zero3_init": 3}
CLASSES = [{"input_ids": row["input_ids"] % 99, "labels": at % 2} for at, row in enumerate(ROWS)]
BERTS: dict[str, dict[str, Any]] = {  # with biases and a base that is kept, saved or not
    "bert": {},
    "noisy bert": {"redraw": "targets", "save_kept": True},
    "noisy bert over its base": {"redraw": "targets"},
}
RUNS = [
    *(("zero2", name) for name in ("dense", "packed")),
    *(("zero3", name) for name in OPTIONS),
    *(("zero3_init", name) for name in ("dense", "packed")),
]
BERT_RUNS = [("zero2", "bert"), *(("zero3", name) for name in BERTS), *(("zero3_init", name) for name in BERTS)]


def arguments(folder: Path, mode: str, **changes: Any) -> TrainingArguments:
    zero = {"stage": MODES[mode], "stage3_param_persistence_threshold": 100}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    options = {"zero_optimization": {**zero, **changes.pop("zero", {})}, **dict.fromkeys(auto, "auto")}
    if changes.get("bf16"):
        options["bf16"] = {"enabled": "auto"}
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "report_to": "none", "logging_steps": 1,
        "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    return TrainingArguments(str(folder), deepspeed=options, **{**settings, **changes})


def base_model(of_text: bool) -> PreTrainedModel:
    """A language model, or a classifier with biases; without dropout, which ranks would draw apart."""
    set_seed(0)
    if of_text:
        return llama(vocab_size=200, tie_word_embeddings=False)
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.accepts_loss_kwargs = False  # its loss is a mean, see examples/train_glue.py
    return model


def built(base: PreTrainedModel, mode: str) -> PreTrainedModel:
    """The same model, in parts from the beginning where the mode says so."""
    if mode != "zero3_init":
        return base
    set_seed(0)
    parts = type(base)._from_config(base.config)
    parts.accepts_loss_kwargs = getattr(base, "accepts_loss_kwargs", True)
    assert all(is_partitioned(parameter) for parameter in parts.parameters())
    return parts


def train(
    folder: Path, mode: str, options: dict[str, Any], resume: str | None = None, of_text: bool = True, **changes: Any
) -> Trainer:
    engines.forget()
    args = arguments(folder, mode, **changes)
    base = built(base_model(of_text), mode)
    counted = UntilTheFirstStep()
    model = get_peft_model(base, config(task_type="CAUSAL_LM" if of_text else "SEQ_CLS", **options))
    trainer = Trainer(model, args, train_dataset=ROWS if of_text else CLASSES, callbacks=[counted])
    trainer.counted = counted
    trainer.train(resume_from_checkpoint=resume)
    engine: Any = trainer.model_wrapped
    assert type(engine).__name__ == "DeepSpeedEngine" and engine.zero_optimization_stage() == MODES[mode]
    assert dist.get_world_size() == trainer.accelerator.num_processes == 2
    return trainer


def held(model: PeftModel) -> dict[str, Any]:
    """How many scaffold tensors are whole, in parts, and out of memory; and how many elements are in parts here."""
    plan = model.get_plan()
    live = [getattr(*owner_of(model.base_model.model, path)) for path in plan.scaffold]
    return {
        "parts": sum(is_partitioned(tensor) for tensor in live),
        "virtual": sum(isinstance(tensor, VirtualWeight) for tensor in live),
        "tensors": len(live),
        "elements": sum(tensor.ds_tensor.numel() for tensor in live if is_partitioned(tensor)),
        "scaffold": sum(spec.numel for spec in plan.scaffold.values()),
        "A": sum(adapter.r * adapter.in_features for adapter in plan.adapters),
        "trained": sum(tensor.survey.numel for tensor in plan.with_role("trained") if tensor.survey.kind != "norm"),
        "all": sum(parameter.nbytes for parameter in model.parameters()),
    }


def same(one: PeftModel, other: PeftModel) -> bool:
    """Whether what each trains is the same to the bit, of partitioned tensors this rank's parts."""
    trained = [{key: p for key, p in its.named_parameters() if p.requires_grad} for its in (one, other)]
    assert trained[0].keys() == trained[1].keys()
    return all(torch.equal(local_part(trained[0][key])[0], local_part(trained[1][key])[0]) for key in trained[0])


def refused(folder: Path, **changes: Any) -> str:
    options = changes.pop("options", OPTIONS["dense"])
    try:
        train(folder, "zero3", options, **changes)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "was not refused"


def main() -> None:
    folder, found = Path(sys.argv[1]), {}
    engines.allow_deepspeed()
    for mode, name in RUNS:
        here, options = folder / mode / name, OPTIONS[name]
        trainer = train(here, mode, options, save_strategy="steps", save_steps=2)
        trainer.model.verify_scaffold(full=True)
        trainer.save_model(str(here / "saved"))
        again = train(here, mode, options, str(here / "checkpoint-2"))
        found[f"{mode} {name}"] = {
            **held(trainer.model), "losses": losses(trainer), "resumed": losses(again), "same": same(trainer.model, again.model),
            "drawn": trainer.counted.drawn, "sent": trainer.counted.sent,
        }  # fmt: skip
    for mode, name in BERT_RUNS:
        trainer = train(folder / mode / name, mode, BERTS[name], of_text=False)
        trainer.model.verify_scaffold()
        trainer.save_model(str(folder / mode / name / "saved"))
        engine: Any = trainer.model_wrapped
        engine.eval()
        with torch.no_grad():
            outputs = engine(input_ids=ids()).logits
        found[f"{mode} {name}"] = {"losses": losses(trainer), "logits": outputs.tolist()}
    for name in ("dense", "packed"):
        trainer = train(folder / "half" / name, "zero3", OPTIONS[name], bf16=True)
        trainer.model.verify_scaffold(full=True)
        found[f"half {name}"] = {"losses": losses(trainer)}
    found["another seed"] = refused(folder, options={**OPTIONS["dense"], "seed": 5 + dist.get_rank()})
    copied = folder / "of three" / "checkpoint-2"
    if dist.get_rank() == 0:
        shutil.copytree(folder / "zero3" / "dense" / "checkpoint-2", copied)
        (next(copied.glob("global_step*")) / "third_optim_states.pt").touch()
    dist.barrier()
    found["of three"] = refused(folder, resume=str(copied))
    found["quantised"] = refused(folder, zero={"zero_quantized_nontrainable_weights": True})
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
