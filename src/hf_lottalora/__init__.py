"""Train a Transformer from a random seed: a PEFT plugin for LottaLoRA (arXiv 2604.08749).

Read it in this order: `draw` (numbers from a seed), `families`, `matrix_families` and `scales`, `scaffold` (one drawn
tensor), `functional`, `layer` and `conv` (the equation). That is the paper. Then the plumbing: `config` and
`config_checks` (all options), `initialization` and `survey` (what a model consists of), `targets`, `patterns`, `plan`,
`planner` and `adapter_planner` (roles of its tensors), `virtual_weight`, `virtual_operations`, `int4` and `residency`
(weights that are not in memory), `gpu` and `triton_kernels`, `base_model` and `trained` (their values), `model` (the
PEFT tuner) with `merging`, `second_adapter` and `reseed`, `checkpoint`, `artifact` and `auto` (saving and loading),
`distributed`; experiments: `resampling`, `beta_report`, `rank_search`, `cost_report` (with `_figure`). `_registry`
makes the method known to PEFT when the package is imported.
"""

from ._registry import register as _register

_register()

from .auto import (  # noqa: E402
    AutoLottaLoraModel,
    AutoLottaLoraModelForCausalLM,
    AutoLottaLoraModelForImageClassification,
    AutoLottaLoraModelForQuestionAnswering,
    AutoLottaLoraModelForSeq2SeqLM,
    AutoLottaLoraModelForSequenceClassification,
    AutoLottaLoraModelForTokenClassification,
)
from .beta_report import BetaCallback, BetaReport, beta_report  # noqa: E402
from .config import LottaLoraConfig  # noqa: E402
from .cost_report import CostReport, cost_report  # noqa: E402
from .distributed import RanksAgreeCallback, check_ranks_agree  # noqa: E402
from .draw import FORMAT_VERSION  # noqa: E402
from .families import FAMILIES, Family, get_family, register_family  # noqa: E402
from .model import LottaLoraModel  # noqa: E402
from .plan import Plan  # noqa: E402
from .planner import make_plan  # noqa: E402
from .rank_search import RankSearch, minimum_sufficient_rank  # noqa: E402
from .resampling import ResampleScaffoldCallback, ScaffoldResampler  # noqa: E402
from .scaffold import ScaffoldTensor  # noqa: E402

__all__ = [
    "FAMILIES",
    "FORMAT_VERSION",
    "AutoLottaLoraModel",
    "AutoLottaLoraModelForCausalLM",
    "AutoLottaLoraModelForImageClassification",
    "AutoLottaLoraModelForQuestionAnswering",
    "AutoLottaLoraModelForSeq2SeqLM",
    "AutoLottaLoraModelForSequenceClassification",
    "AutoLottaLoraModelForTokenClassification",
    "BetaCallback",
    "BetaReport",
    "CostReport",
    "Family",
    "LottaLoraConfig",
    "LottaLoraModel",
    "Plan",
    "RankSearch",
    "RanksAgreeCallback",
    "ResampleScaffoldCallback",
    "ScaffoldResampler",
    "ScaffoldTensor",
    "beta_report",
    "check_ranks_agree",
    "cost_report",
    "get_family",
    "make_plan",
    "minimum_sufficient_rank",
    "register_family",
]
