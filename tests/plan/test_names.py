"""Names that match nothing: what was probably meant, once."""

from __future__ import annotations

from typing import Any

import pytest
from peft import get_peft_model
from tiny import config, llama

from hf_lottalora import make_plan


@pytest.mark.parametrize(
    ("given", "guess"),
    [
        ("q_proj", r"did you mean \['q_proj'\]\? A string is a regular expression for whole paths\)\. Pass"),
        ("self_attn.q_proj", r"did you mean \['self_attn.q_proj'\]\? A string"),
        ("q_porj", r"did you mean \['q_proj'\]\? A string"),
        (r".*\.q_porj", r"did you mean 'q_proj'\?"),
        (["foo", "q_porj"], r"did you mean 'q_proj'\?"),
        (["all-linear"], r"did you mean the string 'all-linear'\?"),
        ("all_linear", r"did you mean the string 'all-linear'\?"),
        ("foo", r"outside what is trained as a whole\. Pass"),
        (".*foo(bar)?", r"outside what is trained as a whole\. Pass"),
    ],
)
def test_targets_that_match_nothing(given: Any, guess: str) -> None:
    with pytest.raises(ValueError, match=f"matches no linear layer.*{guess}"):
        make_plan(llama(), config(target_modules=given))


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"target_modules": ["q_proj", "all-linear"]}, "matches no layer (did you mean the string 'all-linear'?). It"),
        ({"exclude_modules": ["k_prjo"]}, "matches no layer (did you mean 'k_proj'?). It is ignored."),
        ({"exclude_modules": "k_proj"}, "matches no layer (did you mean ['k_proj']? A string is a regular expression"),
        ({"exclude_modules": "k_prjo|foo"}, "matches no layer. It is ignored."),
        ({"rank_pattern": {"q_projj": 2}}, "matches no layer (did you mean 'q_proj'?). It is ignored."),
        ({"alpha_pattern": {"q_projj": 2, "q_proj": 3}}, "matches no layer (did you mean 'q_proj'?). It is ignored."),
    ],
)
def test_what_is_ignored_is_said_once(options: dict[str, Any], warning: str) -> None:
    settings = config(**options)
    with pytest.warns() as caught:
        model = get_peft_model(llama(), settings)
    (message,) = (str(w.message) for w in caught if w.category is not FutureWarning)  # transformers' own
    assert warning in message
    with model.scaffold_seed(7):  # plans again; warnings are errors
        pass
    for name, value in options.items():  # what PEFT was not shown is there again
        found = getattr(settings, name)
        assert (sorted(found) if isinstance(value, list) else found) == (
            sorted(value) if isinstance(value, list) else value
        )


def test_patterns_that_match_still_count() -> None:
    model = get_peft_model(llama(), config(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6}))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert (layer.r["default"], layer.scaling["default"]) == (2, 3.0)
