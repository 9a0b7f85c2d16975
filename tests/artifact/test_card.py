"""The model card: what it says, and that a user's words in it stay."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from hub import Hub, card_errors
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import PeftModel, get_peft_model
from tiny import SIZES, bert, config, llama, logits, mlp, perturb, t5, vit

from hf_lottalora.artifact.loaders import LOADERS, pipeline_tag


def data_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def saved_card(model: PeftModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return (folder / "README.md").read_text()


def test_metadata(tmp_path: Path) -> None:
    card = saved_card(get_peft_model(bert(), config()), tmp_path)
    assert data_of(card) == {
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["bert", "lottalora", "text-classification", "transformers"],
    }
    assert not card_errors(card) and "[More Information Needed]" not in card


@pytest.mark.parametrize(
    ("architecture", "class_name", "task"),
    [
        ("LlamaConfig", "LlamaForCausalLM", "text-generation"),
        ("BertConfig", "BertForMaskedLM", "fill-mask"),
        ("BertConfig", "BertForTokenClassification", "token-classification"),
        ("BertConfig", "BertForQuestionAnswering", "question-answering"),
        ("BertConfig", "BertModel", "feature-extraction"),
        ("ViTConfig", "ViTModel", "image-feature-extraction"),
        ("ViTConfig", "ViTForImageClassification", "image-classification"),
        ("T5Config", "T5ForConditionalGeneration", "text2text-generation"),
        ("WhisperConfig", "WhisperForConditionalGeneration", "automatic-speech-recognition"),
        ("Wav2Vec2Config", "Wav2Vec2ForCTC", "automatic-speech-recognition"),
        ("ASTConfig", "ASTForAudioClassification", "audio-classification"),
        ("DetrConfig", "DetrForObjectDetection", "object-detection"),
        ("SegformerConfig", "SegformerForSemanticSegmentation", "image-segmentation"),
        ("VideoMAEConfig", "VideoMAEForVideoClassification", "video-classification"),
        ("LlavaConfig", "LlavaForConditionalGeneration", "image-text-to-text"),
        ("BertConfig", "BertForPreTraining", None),
    ],
)
def test_pipeline_tags_are_transformers_own(architecture: str, class_name: str, task: str | None) -> None:
    assert pipeline_tag(getattr(transformers, architecture)(), class_name) == task
    assert pipeline_tag(None, class_name) is None and len(LOADERS) > 10


def test_figures(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(rank_pattern={"q_proj": 2}, family="binary"))
    with torch.no_grad():
        betas = [p for name, p in model.named_parameters() if "lora_beta" in name]
        for n, beta in enumerate(betas):
            beta.fill_(n / 4)
    card = saved_card(model, tmp_path)
    plan = model.get_plan()
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    share = f"{plan.trainable_parameters / plan.total_parameters:.2%}"
    for line in (
        "| seed | 42 |",
        "| family | binary |",
        "| rank | 2 to 4 |",
        f"| trained parameters | {plan.trainable_parameters:,}, {share} of {plan.total_parameters:,} |",
        f"| size of the weights here | {size:,} bytes; all of the model's are {4 * llama().num_parameters():,} bytes |",
        "| beta | mean 0.875, from 0 to 1.75, of 8 layers |",
        f"- PEFT {sys.modules['peft'].__version__}",
        f"- Transformers {transformers.__version__}",
    ):
        assert line in card, line


@pytest.mark.parametrize("build", [llama, bert, vit, t5, mlp])
def test_saving_again_changes_nothing(tmp_path: Path, build: Any) -> None:
    options = {"target_modules": ["0", "2"], "modules_to_save": ["4"]} if build is mlp else {}
    model = get_peft_model(build(), config(**options))
    assert saved_card(model, tmp_path) == saved_card(model, tmp_path)


MINE = "---\nlicense: mit\ntags:\n- mine\ndatasets:\n- glue\nlanguage: de\n---\nMy words.\n"


def test_a_users_words_and_metadata_stay(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "README.md").write_text(MINE)
    model = get_peft_model(llama(), config())
    card = saved_card(model, tmp_path)
    (tmp_path / "README.md").write_text(card + "\nMore words.\n")
    HfApi().create_repo("user/name")
    HfApi().upload_folder(repo_id="user/name", folder_path=tmp_path, allow_patterns="README.md")
    model.push_to_hub("user/name", tags=["new"])  # onto a card that is there
    pushed = hub.repos["user/name"].files()["README.md"].decode()
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="user/second")
    for text in (pushed, hub.repos["user/second"].files()["README.md"].decode(), (tmp_path / "README.md").read_text()):
        assert text.index("My words.") < text.index("# LlamaForCausalLM") < text.index("More words.")
        assert text.count("My words.") == text.count("# LlamaForCausalLM") == text.count("More words.") == 1
        data = data_of(text)
        assert data["license"] == "mit" and data["datasets"] == ["glue"] and data["language"] == "de"
        assert {"mine", "lottalora", "llama"} <= set(data["tags"])
    assert "new" in data_of(pushed)["tags"]


def test_templates_give_way_and_filled_ones_do_not(tmp_path: Path) -> None:
    template = ModelCard.from_template(
        ModelCardData(base_model=""),
        model_description="This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been automatically generated.",
    )
    model = get_peft_model(llama(), config())
    for text in (str(template), str(template) + "\n### Framework versions\n\n- PEFT 0.21.0"):
        (tmp_path / "README.md").write_text(text)
        assert "[More Information Needed]" not in saved_card(model, tmp_path)
    filled = str(template).replace("- **Developed by:** [More Information Needed]", "- **Developed by:** Ada")
    (tmp_path / "README.md").write_text(filled)
    card = saved_card(model, tmp_path)
    assert "Developed by:** Ada" in card and "[More Information Needed]" in card and not card_errors(card)


@pytest.mark.parametrize("options", [{}, {"redraw": "targets"}, {"redraw": "none"}])
def test_a_base_model_is_named_where_its_weights_are_used(tmp_path: Path, options: dict[str, Any]) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    for name, shown in {str(tmp_path / "base"): None, "user/base": "user/base"}.items():
        base = type(base).from_pretrained(tmp_path / "base")
        base.config._name_or_path = base.name_or_path = name
        (tmp_path / "README.md").write_text("---\nbase_model: ''\n---\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that weights are drawn over, and that there is no such repository
            card = saved_card(get_peft_model(base, config(**options)), tmp_path)
        assert data_of(card).get("base_model") == (shown if options else None)
        assert any(tag.startswith("base_model:") for tag in data_of(card)["tags"]) == bool(options and shown)
        assert not card_errors(card)


@pytest.mark.parametrize("revision", ["main", pytest.param("other", marks=pytest.mark.smoke)])
def test_the_pushed_snippet_runs_when_pasted(hub: Hub, revision: str) -> None:
    model = get_peft_model(llama(), config()).eval()
    perturb(model)
    model.push_to_hub("user/name", revision=revision)
    card = hub.repos["user/name"].files(revision)["README.md"].decode()
    assert "path/to" not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    code += f"\nimport torch; torch.set_num_threads({torch.get_num_threads()})"  # sums are rounded by their number
    code += "\nprint(model(torch.arange(5)[None]).logits.double().sum().item().hex())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=hub.environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    expected = model(torch.arange(5)[None]).logits.double().sum().item()
    assert abs(float.fromhex(done.stdout.split()[-1]) - expected) < 1e-6


def test_the_snippet_over_a_module_of_ones_own(hub: Hub) -> None:
    model = get_peft_model(mlp(), config(target_modules=["0", "2"], modules_to_save=["4"]))
    perturb(model)
    model.push_to_hub("user/name")
    (code,) = re.findall(r"```python\n(.*?)```", hub.repos["user/name"].files()["README.md"].decode(), flags=re.DOTALL)
    assert code.startswith("import hf_lottalora")
    scope: dict[str, Any] = {"build_the_module": mlp}
    exec(code, scope)
    x = torch.ones(2, 12)
    assert torch.equal(scope["model"](x), model(x))


def test_the_install_line_is_from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    from email.message import Message

    from hf_lottalora.artifact import card

    assert "pip install hf-lottalora" not in card._install()
    project = Message()
    monkeypatch.setattr(card, "metadata", lambda name: project)
    assert "which no package index has" in card._install()
    project["Project-URL"] = "Repository, https://example.org/a/b"
    assert "pip install 'hf-lottalora @ git+https://example.org/a/b'" in card._install()


def test_an_older_card(tmp_path: Path) -> None:
    """Of version 0.1: its part is taken away whole."""
    old = "---\ntags:\n- lottalora\n---\n<!-- hf_lottalora: begin -->\n# Old\n\nNeeds `pip install hf-lottalora`.\n<!-- hf_lottalora: end -->\n"
    (tmp_path / "README.md").write_text(old)
    card = saved_card(get_peft_model(llama(vocab_size=SIZES["vocab_size"]), config()), tmp_path)
    assert "# Old" not in card and "pip install hf-lottalora" not in card
    assert logits(get_peft_model(llama(), config())).ndim == 3
