"""Artifacts that one release of transformers and PEFT writes and another one loads: `make versions`.

    one/bin/python tests/artifact/versions.py write FOLDER
    other/bin/python tests/artifact/versions.py read FOLDER

Each architecture is written with a batch and its output. Reading it, by our loader and over a base model that is built
here, must give that output, or refuse it in our words: where this release names tensors otherwise, or has other sizes
for the same options. Only those in `RENAMED` and `OTHERS` may be refused. `--all` takes every architecture; what fails then is printed
and needs a look.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import hf_lottalora  # isort: skip  # first: it registers the method with PEFT
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_lottalora.artifact.loaders import loader_of

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests/helpers"), str(ROOT / "benchmarks")]

from architectures import built, found, output  # noqa: E402  (from the folders above)
from shrink import MODEL_TYPES  # noqa: E402
from tiny import config, perturb  # noqa: E402

TYPES = (
    "albert", "bart", "bert", "bloom", "clip", "deberta-v2", "deit", "distilbert", "electra", "gemma2", "gpt2",
    "gpt_neox", "llama", "mamba", "mistral", "mixtral", "modernbert", "opt", "phi3", "qwen2", "resnet", "roberta",
    "segformer", "swin", "t5", "vit", "wav2vec2", "whisper",
)  # fmt: skip
RENAMED = {"deit", "gpt_neox", "segformer", "swin", "vit"}
# Since 5.0 also: a head is tied where config.json says nothing (Mamba), a vector is initialised otherwise (Wav2Vec2).
OTHERS = {"mamba", "wav2vec2"}


def write(folder: Path, model_type: str) -> str:
    cls, batch = found(model_type)
    model = peft.get_peft_model(built(cls, model_type), config()).eval()
    perturb(model)
    model.save_pretrained(folder)
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    if tensors.keys() != batch.keys():
        raise RuntimeError("inputs that are no tensors")
    expected = {f"in.{key}": value for key, value in tensors.items()} | {"out": output(model, batch)}
    save_file({key: value.contiguous().clone() for key, value in expected.items()}, folder / "expected")
    return "written"


def read(folder: Path, model_type: str) -> str:
    expected = load_file(folder / "expected")
    batch = {key.removeprefix("in."): value for key, value in expected.items() if key != "out"}
    file = json.loads((folder / "config.json").read_text())
    architecture = transformers.AutoConfig.from_pretrained(folder)
    loader = getattr(hf_lottalora, str(loader_of(architecture, file["architectures"][0])), None)
    if loader is None:
        return "no loader"
    said = []
    cls = getattr(transformers, file["architectures"][0])
    for name, load in {
        "alone": lambda: loader.from_pretrained(folder),
        "over a base": lambda: peft.PeftModel.from_pretrained(cls(architecture), folder),
    }.items():
        try:
            model = load()
        except ValueError as error:
            said.append(f"{name}: refused: {error}")
            continue
        difference = float((output(model.eval(), batch) - expected["out"]).abs().max() / expected["out"].abs().max())
        said.append(f"{name}: same" if difference < 1e-4 else f"{name}: differs by {difference:.1e}")
    return "same" if said == ["alone: same", "over a base: same"] else "; ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true", help="every architecture of transformers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    wrong = 0
    for model_type in MODEL_TYPES if args.all else TYPES:
        folder = args.folder / model_type
        if args.what == "read" and not (folder / "expected").exists():
            continue
        try:
            verdict = {"write": write, "read": read}[args.what](folder, model_type)
        except Exception as error:
            verdict = f"{type(error).__name__}: {error}"
        refused = model_type in RENAMED | OTHERS and "refused" in verdict and "differs" not in verdict
        wrong += verdict not in ("written", "same") and not refused
        if verdict not in ("written", "same") or not args.all:
            print(f"{model_type:<16} {verdict:.400}", flush=True)
    sys.exit(f"{wrong} went wrong." if wrong else 0)


if __name__ == "__main__":
    main()
