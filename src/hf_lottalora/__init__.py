"""Train a Transformer from a random seed: a PEFT plugin for LottaLoRA (arXiv 2604.08749).

Each folder is a wing, which imports from those before it in this list and never from those after it:

- `scaffold`: numbers from a seed. Read `draw`, `families` and `scales`, then `tensor` (one drawn tensor).
- `residency`: a drawn weight that is packed, or not in memory at all.
- `options`, `recorded` and `config`: every option, documented once, and what files say of them.
- `layers`: the equation. Read `functional`, `layer`, `linear`, then `conv`, `embedding`, `rows`, `attention`.
- `plan`: what becomes of each tensor of a model, decided before it is touched. Read `survey`, `plan`, `planner`.
- `artifact`: what is on disk and on the hub, and loading a model from nothing else.
- `tuner`: the PEFT tuner that carries a plan out. Read `model` first.
- `experiments`: reports, callbacks and searches over a model.
- `cli`: what the commands of `lottalora` do; their options and help are in `hf_lottalora_cli`.

`scaffold` and `layers` are the paper, the rest is plumbing. `paths` finds modules under PEFT's layers; `_registry`
makes the method known to PEFT when the package is imported.
"""

from ._registry import register as _register

_register()

from .artifact import auto_classes as _auto_classes  # noqa: E402
from .artifact.auto_classes import *  # noqa: E402, F403
from .config import LottaLoraConfig  # noqa: E402
from .experiments.beta_report import BetaCallback, BetaReport, beta_report  # noqa: E402
from .experiments.cost_report import CostReport, cost_report  # noqa: E402
from .experiments.prelora import PreLoraCallback  # noqa: E402
from .experiments.prelora_report import PreLoraReport  # noqa: E402
from .experiments.rank_search import RankSearch, minimum_sufficient_rank  # noqa: E402
from .experiments.resampling import ResampleScaffoldCallback, ScaffoldResampler  # noqa: E402
from .plan.plan import Plan  # noqa: E402
from .plan.planner import make_plan  # noqa: E402
from .scaffold.draw import FORMAT_VERSION  # noqa: E402
from .scaffold.families import FAMILIES, Family, get_family, register_family  # noqa: E402
from .scaffold.tensor import ScaffoldTensor  # noqa: E402
from .tuner.distributed import RanksAgreeCallback, check_ranks_agree  # noqa: E402
from .tuner.export import export_dense  # noqa: E402
from .tuner.export_lora import export_lora  # noqa: E402
from .tuner.groups import parameter_groups  # noqa: E402
from .tuner.model import LottaLoraModel  # noqa: E402
from .tuner.saving_loss import saving_loss  # noqa: E402

__all__ = [
    "FAMILIES",
    "FORMAT_VERSION",
    "BetaCallback",
    "BetaReport",
    "CostReport",
    "Family",
    "LottaLoraConfig",
    "LottaLoraModel",
    "Plan",
    "PreLoraCallback",
    "PreLoraReport",
    "RankSearch",
    "RanksAgreeCallback",
    "ResampleScaffoldCallback",
    "ScaffoldResampler",
    "ScaffoldTensor",
    "beta_report",
    "check_ranks_agree",
    "cost_report",
    "export_dense",
    "export_lora",
    "get_family",
    "make_plan",
    "minimum_sufficient_rank",
    "parameter_groups",
    "register_family",
    "saving_loss",
]
__all__ += _auto_classes.__all__
