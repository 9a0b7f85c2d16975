"""What is said when the hub refuses, cannot be reached or breaks off, with warm and with cold caches."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft import LoraConfig as PeftLora
from tiny import config, llama, logits, mlp, perturb

from hf_lottalora import AutoLottaLoraModelForCausalLM, LottaLoraConfig

SAID = "client has been closed" if version("huggingface_hub").startswith("1.") else "Connect"
WAYS: dict[str, Callable[..., Any]] = {
    "ours": AutoLottaLoraModelForCausalLM.from_pretrained,
    "PeftModel": lambda path, **hub: PeftModel.from_pretrained(llama(), path, **hub),
    "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained,
    "config": LottaLoraConfig.from_pretrained,
}
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def pushed(hub: Hub) -> PeftModel:
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM")).eval()
    perturb(model)
    model.push_to_hub("user/name")
    return model


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def same(way: str, model: PeftModel, **options: Any) -> bool:
    again = WAYS[way]("user/name", **options)
    return isinstance(again, LottaLoraConfig) or torch.equal(logits(again), logits(model))


@every_way
def test_offline_with_a_warm_cache(hub: Hub, pushed: PeftModel, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    WAYS["ours"]("user/name")
    offline(monkeypatch)
    seen = len(hub.requests)
    assert same(way, pushed) and len(hub.requests) == seen


@every_way
def test_offline_with_a_cold_cache(
    hub: Hub, pushed: PeftModel, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offline(monkeypatch)
    with pytest.raises(
        (OSError, ValueError), match="adapter_config.json of user/name.* not in the cache.*HF_HUB_OFFLINE"
    ):
        WAYS[way]("user/name", cache_dir=str(tmp_path))


@pytest.mark.parametrize("way", ["ours", "AutoPeftModel", "config"])
def test_local_files_only(hub: Hub, pushed: PeftModel, way: str) -> None:
    with pytest.raises(OSError, match="adapter_config.json of user/name.* not in the cache.*local_files_only=True"):
        WAYS[way]("user/name", local_files_only=True)
    WAYS["ours"]("user/name")
    assert same(way, pushed, local_files_only=True)


@every_way
def test_half_a_cache(hub: Hub, pushed: PeftModel, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PeftConfig.from_pretrained("user/name")
    offline(monkeypatch)
    with pytest.raises(
        OSError, match=r"(adapter_model.safetensors|^config.json) of user/name at revision '[0-9a-f]{40}' is not in the"
    ):
        WAYS[way]("user/name")


@every_way
@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, r"shows it to some tokens only \(status 401\)"),
        (403, r"refuses .* \(status 403\)"),
        (503, "could not be fetched.*503"),
    ],
)
def test_a_status(hub: Hub, pushed: PeftModel, way: str, status: int, says: str) -> None:
    hub.rule("/resolve/", status)
    with pytest.raises((OSError, ValueError), match=f"(?s){says}"):
        WAYS[way]("user/name")


@every_way
@pytest.mark.parametrize("status", [401, 403, 503])
def test_a_warm_cache_helps(hub: Hub, pushed: PeftModel, way: str, status: int) -> None:
    WAYS["ours"]("user/name")
    hub.rule("/resolve/|/api/", status)
    assert same(way, pushed)


@every_way
def test_the_server_is_gone(hub: Hub, pushed: PeftModel, way: str) -> None:
    hub.close()
    with pytest.raises((OSError, ValueError), match=f"adapter_config.json of user/name could not be fetched.*{SAID}"):
        WAYS[way]("user/name")


@every_way
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "config.json"])
@pytest.mark.parametrize("status", [503, 403])
def test_an_outage_of_one_file_is_not_its_absence(
    hub: Hub, pushed: PeftModel, way: str, file: str, status: int
) -> None:
    """Without config.json the architecture would go unchecked."""
    hub.rule(f"/resolve/.*/{file}", status)
    with pytest.raises((OSError, ValueError), match=f"(?s){file} of user/name.*{status}"):
        WAYS[way]("user/name")


@every_way
@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("user/other", {}, r"There is no folder 'user/other', and the hub has no such repository .*\(status 404\)"),
        ("user/name", {"token": "hf_wrong"}, r"\(status 401\)"),
        ("user/name", {"revision": "v9"}, "user/name has no revision 'v9'"),
        ("./no/such/folder", {}, "is neither a folder that exists nor the name of a hub repository"),
        ("user/name", {"subfolder": "x"}, "Can't find 'adapter_config.json' at 'user/name'"),
    ],
)
def test_what_is_not_there(hub: Hub, pushed: PeftModel, way: str, name: str, options: Any, says: str) -> None:
    with pytest.raises((OSError, ValueError), match=f"(?s){says}"):
        WAYS[way](name, **options)


@every_way
def test_gated(hub: Hub, pushed: PeftModel, way: str) -> None:
    hub.repos["user/name"].gated = True
    with pytest.raises((OSError, ValueError), match="user/name is gated: ask for access"):
        WAYS[way]("user/name", token="hf_other")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "config.json"])
def test_a_download_that_breaks_off_goes_on(hub: Hub, pushed: PeftModel, file: str) -> None:
    hub.rule(f"GET .*/resolve/.*/{file}", "cut", times=2)
    if version("huggingface_hub").startswith("1."):  # which leaves it to the next call to go on
        for _ in range(2):
            with pytest.raises(OSError, match=f"{file} of user/name.* could not be fetched"):
                WAYS["ours"]("user/name")
    assert same("ours", pushed)


@every_way
def test_a_download_that_always_breaks_off(hub: Hub, pushed: PeftModel, way: str) -> None:
    hub.rule("GET .*/resolve/.*/adapter_model", 503)
    hub.rule("GET .*/resolve/.*/adapter_model", "cut")
    with pytest.raises(OSError, match="(?s)adapter_model.safetensors of user/name .*could not be fetched"):
        WAYS[way]("user/name")
    hub.rules.clear()
    assert same(way, pushed)


def test_a_module_without_config_json_from_a_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """That there is none is remembered; it is not taken for a file that cannot be had."""
    settings = config(target_modules=["0", "2"], modules_to_save=["4"])
    model = get_peft_model(mlp(), settings)
    perturb(model)
    model.push_to_hub("user/name")
    assert "config.json" not in hub.repos["user/name"].files()
    x = torch.ones(2, 12)
    assert torch.equal(PeftModel.from_pretrained(mlp(), "user/name")(x), model(x))
    offline(monkeypatch)
    assert torch.equal(PeftModel.from_pretrained(mlp(), "user/name")(x), model(x))


def test_an_upload_that_breaks_off_leaves_nothing(hub: Hub) -> None:
    model = get_peft_model(llama(), config())
    for request, then in {"PUT /lfs": "cut", "POST .*/commit/": 503, "POST .*/preupload/": 403}.items():
        hub.rules.clear()
        hub.rule(request, then)
        with pytest.raises((HfHubHTTPError, RuntimeError, OSError)):
            model.push_to_hub("user/name")
        assert hub.repos["user/name"].files().keys() == {".gitattributes"}
    hub.rules.clear()
    hub.rule("PUT /lfs", "cut", times=1)
    model.push_to_hub("user/name")
    assert "adapter_model.safetensors" in hub.repos["user/name"].files()


def test_the_card_is_not_replaced_while_the_old_one_cannot_be_read(hub: Hub, pushed: PeftModel) -> None:
    hub.rule("HEAD .*README", 503)
    commit = hub.repos["user/name"].refs["main"]
    with pytest.raises(OSError, match="README.md of user/name could not be fetched"):
        pushed.push_to_hub("user/name")
    assert hub.repos["user/name"].refs["main"] == commit


def test_pefts_own_methods(hub: Hub) -> None:
    """Of another method nothing changes but the reason in one error."""
    model = get_peft_model(llama(), PeftLora(target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.push_to_hub("user/lora")
    assert hub.repos["user/lora"].files().keys() >= {"adapter_config.json", "README.md"}
    base = llama()
    base.load_state_dict(
        {
            k.replace("base_model.model.", "").replace(".base_layer", ""): v
            for k, v in model.state_dict().items()
            if "lora_" not in k
        }
    )
    again = PeftModel.from_pretrained(base, "user/lora")
    again.load_adapter("user/lora", "second")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at 'user/none'. There is no folder"):
        PeftModel.from_pretrained(llama(), "user/none")
