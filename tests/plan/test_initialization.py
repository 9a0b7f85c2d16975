from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny import bert, config, gpt2, ids, llama, mlp, vit
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import DistilBertConfig, DistilBertModel, Gemma2Config, Gemma2ForCausalLM

from hf_lottalora import ScaffoldTensor


def random_states() -> tuple[object, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("build", [llama, bert, gpt2, vit])
def test_the_users_random_state_is_untouched_and_does_not_enter(build: object) -> None:
    embeddings = "train" if build is vit else "lora"
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = build()  # type: ignore[operator]
        for parameter in model.parameters():
            parameter.data.normal_()  # whatever the weights were before, nothing of them survives
        before = random_states()
        model = get_peft_model(model, config(embeddings=embeddings))
        assert random_states() == before
        results.append(model.state_dict())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_forward_leaves_the_random_state_alone() -> None:
    model = get_peft_model(llama(), config()).eval()
    before = random_states()
    model(ids())
    assert random_states() == before


def test_constants_are_the_architectures_own() -> None:
    model = get_peft_model(bert(), config()).base_model.model
    assert torch.equal(model.bert.embeddings.LayerNorm.weight, torch.ones(32))
    assert not model.bert.encoder.layer[0].output.dense.bias.any()
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=1))
    gemma.model.norm.weight.data.fill_(7.0)
    get_peft_model(gemma, config())
    assert not gemma.model.norm.weight.any()  # Gemma's norm weight is an offset from 1


def test_sinusoidal_positions_are_kept() -> None:
    architecture = DistilBertConfig(
        vocab_size=99, dim=32, hidden_dim=48, n_layers=1, n_heads=4, sinusoidal_pos_embds=True
    )
    model = DistilBertModel(architecture)
    table = model.embeddings.position_embeddings.weight.clone()
    peft_model = get_peft_model(model, config())
    assert torch.equal(model.embeddings.position_embeddings.weight, table)
    roles = {t.path: t.role for t in peft_model.get_plan().tensors}
    assert roles["embeddings.position_embeddings.weight"] == "kept"


def test_trained_tensors_start_from_the_stream() -> None:
    model = get_peft_model(bert(), config(adapter_seed=5)).base_model.model
    spec = ScaffoldTensor("classifier.weight", (2, 32), 5, "normal", 0.02)
    assert torch.equal(model.classifier.weight, spec.draw())
    words = ScaffoldTensor("embeddings.word_embeddings.weight", (99, 32), 5, "normal", 0.02, zero_row=0)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, words.draw())
    assert not model.bert.embeddings.word_embeddings.weight[0].any()


def test_a_plain_modules_biases_come_from_torchs_distribution_and_our_stream() -> None:
    model = get_peft_model(mlp(), config(target_modules=["0", "2"], modules_to_save=["4"])).base_model.model
    spec = ScaffoldTensor("0.bias", (16,), 42, "uniform", 1 / (3 * 12) ** 0.5)
    assert torch.equal(model[0].base_layer.bias, spec.draw())
    assert model[0].base_layer.bias.abs().max() <= 12**-0.5
    assert torch.equal(model[4].weight, ScaffoldTensor("4.weight", (3, 16), 42, "uniform", 1 / 48**0.5).draw())


class Scaled(nn.Module):
    """Has a parameter that only its constructor knows how to make."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.tensor([1e-6]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * self.linear(x)


def test_what_no_init_code_touches_is_kept_and_saved() -> None:
    model = get_peft_model(Scaled(), config(target_modules=["linear"]))
    gain = next(tensor for tensor in model.get_plan().tensors if tensor.path == "gain")
    assert gain.role == "kept" and gain.saved
    assert model.base_model.model.gain.item() == pytest.approx(1e-6)


def test_a_matrix_that_the_architecture_sets_to_zero_is_kept() -> None:
    class ZeroOut(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    module = nn.Sequential(nn.Linear(4, 4), ZeroOut(4, 4))
    module[1].weight.data.fill_(3.0)
    model = get_peft_model(module, config(target_modules=["0"]))
    assert {t.path: t.role for t in model.get_plan().tensors}["1.weight"] == "kept"
    assert not module[1].weight.any()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.scale = nn.Parameter(torch.ones(16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.encoder(x) * self.scale)
        return result


class WithQueries(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, 16))


def test_a_plain_module_is_drawn_from_the_seed_alone() -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = get_peft_model(Encoder(), config(target_modules=["linear1"], modules_to_save=["head"]))
        assert "encoder.layers.0.self_attn.in_proj_weight" in model.get_plan().scaffold
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_matrix_under_weight_norm_is_drawn() -> None:
    module = nn.Sequential(weight_norm(nn.Conv1d(4, 6, 3)), nn.Flatten(), nn.Linear(6, 2))
    get_peft_model(module, config(target_modules=["2"]))
    spec = ScaffoldTensor("0.parametrizations.weight.original1", (6, 4, 3), 42, scale=12**-0.5)
    torch.testing.assert_close(module[0].weight, spec.draw())


def test_values_that_no_init_code_makes_are_named() -> None:
    module = WithQueries()
    queries = module.queries.detach().clone()
    with pytest.warns(
        UserWarning, match=r"^queries keep the values that WithQueries was built with.* reset_parameters"
    ):
        model = get_peft_model(module, config(target_modules=["linear1"], modules_to_save=["head"]))
    assert torch.equal(model.base_model.model.queries, queries)
    assert "queries" in model.get_plan().saved


def test_a_base_model_that_nobody_can_load_again_is_named() -> None:
    with pytest.warns(UserWarning, match=r"redraw='none' keeps \d+ tensors .* Pass save_kept=True"):
        get_peft_model(llama(), config(redraw="none"))
