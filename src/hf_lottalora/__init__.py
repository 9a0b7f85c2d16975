"""Train a Transformer from a random seed: a PEFT plugin for LottaLoRA (arXiv 2604.08749).

Read it in this order: `draw` (numbers from a seed), `families`, `scaffold` (one drawn tensor), `functional` and `layer`
(the equation). Then the plumbing: `survey`, `plan` and `planner` (roles of tensors), `model` (the PEFT tuner),
`trained`, `checkpoint`, `artifact`, `auto`. Importing the package registers the method with PEFT.
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
from .config import LottaLoraConfig  # noqa: E402
from .distributed import RanksAgreeCallback, check_ranks_agree  # noqa: E402
from .draw import FORMAT_VERSION  # noqa: E402
from .families import FAMILIES, Family, get_family, register_family  # noqa: E402
from .model import LottaLoraModel  # noqa: E402
from .plan import Plan  # noqa: E402
from .planner import make_plan  # noqa: E402
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
    "Family",
    "LottaLoraConfig",
    "LottaLoraModel",
    "Plan",
    "RanksAgreeCallback",
    "ResampleScaffoldCallback",
    "ScaffoldResampler",
    "ScaffoldTensor",
    "check_ranks_agree",
    "get_family",
    "make_plan",
    "register_family",
]
