"""Where the base model was trained under its adapter as well: what it is now is the base from here on.

An adapter trains copies of some base tensors and keeps the originals, to put them back where it is switched off, and
its plan has digests of what a file would leave out. After training of the base itself both are of another model.
"""

from __future__ import annotations

import torch
from torch import nn

from .model import LottaLoraModel


def forget_originals(tuner: LottaLoraModel, adapter: str) -> None:
    """Let go of the values that trained copies had before: no memory for what is no base any more."""
    for path in tuner.trained.planned[adapter]:
        tuner.trained.originals.drop(path)


def rebase(tuner: LottaLoraModel, adapter: str) -> None:
    """Make what is installed the base: of trained copies their values now, of all that is kept its digests.

    Of one adapter, over a base of which nothing is drawn (`redraw="none"`): the others would be over another base.
    """
    for path, live in tuner.trained.parameters_of(tuner.model, adapter).items():
        tuner.trained.originals.put(path, nn.Parameter(live.detach().clone(), requires_grad=False))
    plan = tuner.plans[adapter]
    plan.kept_bytes.clear()
    plan.kept_digests.clear()
    with torch.no_grad():
        plan.kept_digests.update(tuner.base.kept_digests(plan))
