"""Which layers carry an adapter when nobody names them, and what is said of names that match nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import shrink
import torch
import transformers as T
from peft import PeftModel, get_peft_model
from tiny import SIZES, bert, config, gpt2, ids, llama, logits, mlp, perturb
from torch import nn

from hf_lottalora import AutoLottaLoraModelForCausalLM, make_plan
from hf_lottalora.plan import targets
from hf_lottalora.plan.structure import weights_read

GOLDEN = json.loads(Path(__file__).with_name("default_targets.json").read_text())
# A fixed part of the sweep over all architectures (benchmarks/architectures.py), chosen for what is special in each.
PART = {
    "convbert": "a kernel generator within its attention",
    "convnext": "nothing attends",
    "dinov2": "vision",
    "funnel": "relative positions",
    "gpt_oss": "sinks, and experts in one tensor",
    "jetmoe": "a router in its attention, whose weight is read",
    "lfm2": "attention and convolution in turn",
    "longt5": "local and transient global attention",
    "mamba": "a state space, of which most weights are read",
    "olmo": "no row in the table",
    "swinv2": "a small network for position biases",
    "wav2vec2-conformer": "relative positions, convolutions",
    "wavlm": "weights that are read, position biases from a gate",
    "xlnet": "attention of bare parameters",
}


def condensed(paths: Any) -> list[str]:
    return sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path) for path in paths})


def built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cls = next(cls for cls in shrink.candidates(name) if cls.__name__ == GOLDEN[name]["class"])
        model: nn.Module = cls(shrink.shrunk_config(name))
    return model.eval()


def batch(model: nn.Module) -> dict[str, torch.Tensor]:
    """The first inputs that the model runs on."""
    for inputs in shrink.batches_of(model):
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception:
            continue
        return inputs
    raise AssertionError("no inputs")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PART)
def test_each_chosen_layer_is_called_and_learns(name: str) -> None:
    model = get_peft_model(built(name), config(r=2, init_lora_weights=False))
    plan = model.get_plan()
    if T.__version__.startswith("5.24."):  # the version that the golden file was read for
        assert [plan.rule, condensed(plan.targets)] == [GOLDEN[name]["rule"], GOLDEN[name]["targets"]]
    called = set()
    for path in plan.targets:
        model.get_base_model().get_submodule(path).register_forward_hook(lambda *_, path=path: called.add(path))
    shrink.main_output(model(**batch(model.get_base_model()))).float().square().mean().backward()
    assert called == set(plan.targets)
    B = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert len(B) >= len(called) and [n for n, p in B.items() if p.grad is None or not p.grad.any()] == []


# gemma3's row leaves out the vision tower.
@pytest.mark.parametrize("name", sorted(targets.ATTENTION_PROJECTIONS.keys() - {"gemma3"}))
@pytest.mark.filterwarnings("ignore")
def test_structure_finds_what_the_table_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row of the table was read by eye: it says what the rule should find."""
    cls = next(iter(shrink.candidates(name)))
    with torch.random.fork_rng():
        model = cls(shrink.shrunk_config(name))
    by_table = make_plan(model, config(r=2))
    monkeypatch.setattr(targets, "ATTENTION_PROJECTIONS", {})
    by_structure = make_plan(model, config(r=2))
    assert by_table.rule.startswith(f"attention projections of {name}: ")
    assert by_structure.rule == "by structure: projections of the modules that attend or mix tokens"
    assert by_structure.targets == by_table.targets


def times(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    return x @ layer.weight


class Reader(nn.Module):
    """Reads the weight of `read` in various ways, and may call it too; calls `called`, looks at the dtype of `looked`."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.fused, self.looked = (nn.Linear(4, 4) for _ in range(4))
        self.either, self.lent, self.helped = (nn.Linear(4, 4) for _ in range(3))
        self.inner = nn.ModuleDict({"deep": nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.called(x).to(self.looked.weight.dtype) @ self.read.weight
        x = self.either(x) if self.training else x @ self.either.weight
        x = times(self.rows(x.long(), self.lent), layer=self.helped)
        return self.looked(self.fused(x)) if self.training else nn.functional.linear(x, self.fused.weight)

    def rows(self, index: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        return layer.weight.t()[index]


def test_weights_that_are_read_without_a_call() -> None:
    net = nn.Sequential(Reader(), nn.Linear(4, 4))
    assert weights_read(net) == {"0.read", "0.fused", "0.either", "0.lent", "0.helped"}
    for name in ("read", "fused", "either", "lent", "helped"):
        with pytest.raises(ValueError, match=rf"matches '0.{name}', whose weight Sequential reads without calling"):
            make_plan(net, config(target_modules=[name]))
    everything = make_plan(net, config(target_modules="all-linear"))
    assert everything.targets == ("0.called", "0.inner.deep", "0.looked", "1")


def test_a_network_without_attention() -> None:
    resnet = T.ResNetForImageClassification(T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    plan = make_plan(resnet, config())
    assert plan.rule == "by structure: nothing attends, so all linear layers and convolutions outside embeddings"
    convolutions = {n for n, m in resnet.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(plan.targets) == {name for name in convolutions if "embedder" not in name}
    all_linear = make_plan(resnet, config(target_modules="all-linear"))
    assert all_linear.rule == "all-linear: there are no linear layers, so all convolutions"
    assert set(all_linear.targets) == convolutions
    assert f"adapters  on {len(plan.targets)} layers ({plan.rule})" in str(plan)


def test_convolutions_whose_groups_the_rank_does_not_fit_are_left_out() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2))
    with pytest.warns(UserWarning, match="r=4 leaves out 1: the rank is no multiple"):
        assert make_plan(net, config(r=4, target_modules="all-linear")).targets == ("0", "2")
    assert make_plan(net, config(r=8, target_modules="all-linear")).targets == ("0", "1", "2")


def test_a_plain_module_has_no_default() -> None:
    with pytest.raises(ValueError, match=r"no default target_modules for a plain nn.Module. .* layers are: 0, 2, 4"):
        make_plan(mlp(), config())


# ---- what was chosen is recorded --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [None, "all-linear", ["q_proj"], r".*\.0\..*v_proj"])
def test_an_artifact_says_what_was_chosen(wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(llama(), config(target_modules=wanted, task_type="CAUSAL_LM"))
    perturb(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["resolved_targets"] == list(model.get_plan().targets)
    assert written["target_modules"] == wanted
    # A later version with other rules loads the same.
    monkeypatch.setattr(targets, "ATTENTION_PROJECTIONS", {"llama": ["k_proj"]})
    monkeypatch.setattr(targets, "_all_linear", lambda *_: targets.Targets(set(), "other"))
    for again in (
        PeftModel.from_pretrained(llama(), tmp_path),
        AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert again.get_plan().rule == "recorded in the artifact"
        assert again.get_plan().targets == model.get_plan().targets
        assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert (
        json.loads((tmp_path / "again" / "adapter_config.json").read_text())["resolved_targets"]
        == written["resolved_targets"]
    )


def test_a_default_stays_a_default_for_the_next_model() -> None:
    settings = config()
    first = get_peft_model(llama(num_hidden_layers=1), settings)
    assert set(first.peft_config["default"].target_modules) == set(first.get_plan().targets)
    assert len(get_peft_model(llama(num_hidden_layers=3), settings).get_plan().targets) == 12
    assert get_peft_model(gpt2(), settings).get_plan().targets[0] == "transformer.h.0.attn.c_attn"


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    base = llama()
    attention = base.model.layers[0].self_attn
    attention.keys_proj, attention.k_proj = attention.k_proj, None  # as a release of transformers might
    with pytest.raises(
        ValueError,
        match=r"resolved_targets: the artifact has adapters on 1 layers that LlamaForCausalLM lacks: 'model.layers.0.self_attn",
    ):
        PeftModel.from_pretrained(base, tmp_path)


# ---- names that match nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (
            {"target_modules": ["q_proj", "v_porj"]},
            r"target_modules names 'v_porj', which matches no layer \(did you mean 'v_proj'",
        ),
        (
            {"target_modules": ["q_proj", "query"]},
            "target_modules names 'query', which matches no layer. It is ignored",
        ),
        (
            {"exclude_modules": ["k_prjo"]},
            r"exclude_modules names 'k_prjo', which matches no layer \(did you mean 'k_proj'",
        ),
        (
            {"rank_pattern": {"q_projj": 2}},
            r"rank_pattern names 'q_projj', which matches no layer \(did you mean 'q_proj'",
        ),
        ({"alpha_pattern": {"up_proj": 2}}, "alpha_pattern names 'up_proj', which matches no layer"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 7]},
            r"layers_to_transform names layers \[7\], where LlamaForCausalLM has none",
        ),
    ],
)
def test_beside_names_that_match_they_are_warned_of(options: dict[str, Any], warning: str) -> None:
    with pytest.warns(UserWarning, match=warning):
        make_plan(llama(), config(**options))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"target_modules": ["q_porj"]},
            r"matches no linear layer.* as a whole \(did you mean 'q_proj'\?\). Pass target",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [9]},
            r"target_modules=\['q_proj'\] with layers_to_transform=\[9\] matches no.*\. Its layers have the numbers 0 to 1\.",
        ),
        (
            {"modules_to_save": ["lm_haed"]},
            r"modules_to_save names 'lm_haed', but LlamaForCausalLM .* \(did you mean 'lm_head'",
        ),
        (
            {"family_pattern": {"mlpp.*": "binary"}},
            "family_pattern has the key 'mlpp.*', which matches no drawn module",
        ),
        (
            {"seed_pattern": {"q_porj": 1}},
            r"seed_pattern has the key 'q_porj', which matches no drawn module \(did you mean 'q_proj'",
        ),
        (
            {"train_beta_pattern": {"v_porj": False}},
            r"train_beta_pattern has the key 'v_porj', which matches no adapted module \(did you mean 'v_proj'",
        ),
    ],
)
def test_where_nothing_is_left_they_are_errors(options: dict[str, Any], error: str) -> None:
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=error):
        get_peft_model(model, config(**options))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_of_a_bare_backbone() -> None:
    """PEFT looks for a layer's number behind two names; a backbone without a head has one."""
    for model in (llama(), llama().model, bert(), bert().bert):
        plan = make_plan(model, config(layers_to_transform=[1]))
        assert {re.findall(r"\d+", path)[0] for path in plan.targets} == {"1"}


def test_excluded_layers_stay_out_of_every_rule() -> None:
    for options in ({}, {"target_modules": "all-linear"}, {"target_modules": ["q_proj", "k_proj"]}):
        for excluded in (["k_proj"], r".*\.k_proj"):
            assert not any(
                "k_proj" in p for p in make_plan(llama(), config(**options, exclude_modules=excluded)).targets
            )
    olmo = T.Olmo2Model(T.Olmo2Config(**SIZES))
    assert not any("k_proj" in p for p in make_plan(olmo, config(exclude_modules=["k_proj"])).targets)
    assert ids().shape == (2, 7)


# ---- what code hides ----------------------------------------------------------------------------------------------------


class Loops(nn.Module):
    """Reads weights through names, loops and indices, of which the first argument is not called self."""

    def __init__(self) -> None:
        super().__init__()
        self.looped, self.indexed = (nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(2))
        self.renamed, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(this, x: torch.Tensor) -> torch.Tensor:  # noqa: N805
        for layer in this.looped:
            x = nn.functional.linear(x, layer.weight, layer.bias)
        for i in range(2):
            x = x @ this.indexed[i].weight.T
        other = this.renamed
        return this.called(nn.functional.linear(x, other.weight))


def test_weights_that_are_read_through_other_names() -> None:
    found = {"looped.0", "looped.1", "indexed.0", "indexed.1", "renamed"}
    assert weights_read(Loops()) == found
    assert make_plan(Loops(), config(target_modules="all-linear")).targets == ("called",)


class ReadingHead(nn.Module):
    """Multiplies with the table of its embedding, which it also calls."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.emb(x)) @ self.emb.weight.t()


@pytest.mark.parametrize("options", [{"embeddings": "lora"}, {"embeddings": "frozen", "trainable_token_indices": [7]}])
def test_a_table_that_a_head_reads_carries_no_adapter(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="reads the table of 'emb' without calling it, and would miss the adapter"):
        make_plan(ReadingHead(), config(target_modules=["lin", "emb"], scale=0.1))
    sizes = {**SIZES, "embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16}
    heads = (
        T.MobileBertForMaskedLM(T.MobileBertConfig(**sizes)),
        T.DebertaForMaskedLM(T.DebertaConfig(**SIZES, legacy=False)),
    )
    for model in heads:
        with pytest.raises(ValueError, match="without calling it, and would miss the adapter. Pass embeddings='train'"):
            make_plan(model, config(**options))
    make_plan(bert(), config(**options))  # whose head is none


def test_source_that_cannot_be_read_is_said() -> None:
    space: dict[str, Any] = {"nn": nn}
    exec("class Made(nn.Sequential):\n    def forward(self, x):\n        return super().forward(x)", space)
    with pytest.warns(UserWarning, match="The source of Made cannot be read"):
        make_plan(space["Made"](nn.Linear(4, 4)), config(target_modules="all-linear"))
    make_plan(space["Made"](nn.Linear(4, 4)), config(target_modules=["0"]))  # warnings are errors


def test_hooks_that_an_adapter_would_pass_by() -> None:
    net = nn.Sequential(nn.Linear(8, 8), torch.nn.utils.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    net[0].register_forward_hook(lambda module, args, output: output * 2)
    for name in ("0", "1"):
        with pytest.raises(ValueError, match=rf"matches '{name}', a Linear, whose forward has hooks, which an adapter"):
            get_peft_model(net, config(target_modules=[name]))
    assert all(type(layer) is nn.Linear for layer in net)
    assert make_plan(net, config(target_modules="all-linear")).targets == ("2",)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_planning_changes_nothing_under_norms_of_every_kind() -> None:
    utils = torch.nn.utils
    net = nn.Sequential(
        utils.parametrizations.spectral_norm(nn.Linear(8, 8)), utils.spectral_norm(nn.Linear(8, 8)),
        utils.parametrizations.weight_norm(nn.Linear(8, 8)), utils.weight_norm(nn.Conv1d(8, 8, 3)), nn.Linear(8, 8),
    )  # fmt: skip
    net[:3](torch.ones(1, 8))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert make_plan(net.train(), config(target_modules=["4"])).targets == ("4",)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
