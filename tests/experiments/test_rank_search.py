from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny import bert, config
from transformers import Trainer, TrainingArguments

from hf_lottalora import minimum_sufficient_rank

RANKS = [1, 2, 4, 8, 16, 32]


class Losses:
    """loss = 1 + 1 / rank, and 1 for full training; counts what was trained."""

    def __init__(self, crash_at: int | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.crash_at = crash_at

    def __call__(self, rank: int, seed: int) -> float:
        if rank == self.crash_at:
            raise KeyboardInterrupt
        self.calls.append((rank, seed))
        return 1.0 + (1 / rank if rank else 0) + 0.01 * seed


@pytest.mark.parametrize(("epsilon", "rank"), [(2.0, 1), (0.5, 2), (0.2, 8), (0.04, 32), (0.01, None), (0.0, None)])
def test_the_smallest_rank_that_is_enough(epsilon: float, rank: int | None) -> None:
    losses = Losses()
    search = minimum_sufficient_rank(losses, RANKS, epsilon, seeds=[0, 1])
    assert search.rank == rank
    tried = {tried for tried, _ in losses.calls} - {0}
    assert len(tried) <= 3 and len(losses.calls) == 2 * (len(tried) + 1)
    assert ("none of these ranks is enough" if rank is None else f"r* = {rank} for loss <= ") in str(search)


def test_every_subset_of_candidates_agrees_with_a_full_scan() -> None:
    for size in range(1, 7):
        for epsilon in (0.6, 0.3, 0.1, 0.02):
            expected = next((rank for rank in RANKS[:size] if 1 / rank <= epsilon), None)
            assert minimum_sufficient_rank(Losses(), RANKS[:size], epsilon).rank == expected


def test_a_crashed_search_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    first = Losses(crash_at=4)
    with pytest.raises(KeyboardInterrupt):
        minimum_sufficient_rank(first, RANKS, 0.2, seeds=[0, 1], file=file)
    again = Losses()
    search = minimum_sufficient_rank(again, RANKS, 0.2, seeds=[0, 1], file=file)
    whole = minimum_sufficient_rank(Losses(), RANKS, 0.2, seeds=[0, 1])
    assert search == whole and not set(first.calls) & set(again.calls)
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]
    assert minimum_sufficient_rank(Losses(crash_at=0), RANKS, 0.2, seeds=[0, 1], file=file) == whole


def test_a_known_baseline_is_not_trained() -> None:
    losses = Losses()
    assert minimum_sufficient_rank(losses, RANKS, 0.2, full_loss=1.0).rank == 8
    assert 0 not in dict(losses.calls)


def test_plot(tmp_path: Path) -> None:
    minimum_sufficient_rank(Losses(), RANKS, 0.2, seeds=[0, 1]).plot(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes()[:4] == b"\x89PNG"


def test_a_trainer_factory(tmp_path: Path) -> None:
    data = [{"input_ids": torch.arange(3, 9), "labels": i % 2} for i in range(8)]

    def make(rank: int, seed: int) -> Trainer:
        model = bert()
        model = get_peft_model(model, config(seed=seed, r=rank, task_type="SEQ_CLS")) if rank else model
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, seed=seed
        )
        return Trainer(model=model, args=args, train_dataset=data, eval_dataset=data)  # type: ignore[arg-type]

    search = minimum_sufficient_rank(make, [1, 2], epsilon=100.0)
    assert search.rank == 1 and search.mean(1) == pytest.approx(0.69, abs=0.2)


def test_what_makes_no_sense(tmp_path: Path) -> None:
    for ranks in ([], [0, 1], [True], [1.5]):
        with pytest.raises(ValueError, match="ranks must be positive integers"):
            minimum_sufficient_rank(Losses(), ranks)  # type: ignore[arg-type]
    for epsilon in (-1, "a", None):
        with pytest.raises(ValueError, match=f"epsilon must be >= 0, got {epsilon!r}"):
            minimum_sufficient_rank(Losses(), RANKS, epsilon)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ranks must be several integers, .* got 8"):
        minimum_sufficient_rank(Losses(), 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one seed"):
        minimum_sufficient_rank(Losses(), RANKS, seeds=[])
    with pytest.raises(ValueError, match=r"train\(rank=0, seed=0\) gave the loss nan"):
        minimum_sufficient_rank(lambda rank, seed: float("nan"), RANKS)
    with pytest.raises(ValueError, match="full_loss must be a finite number, got nan"):
        minimum_sufficient_rank(Losses(), RANKS, full_loss=float("nan"))
    losses = Losses()
    with pytest.raises(ValueError, match="is in a folder that does not exist"):
        minimum_sufficient_rank(losses, RANKS, file=tmp_path / "missing" / "search.json")
    assert losses.calls == []
    (tmp_path / "nan.json").write_text('{"losses_by_rank_and_seed": {"0/0": NaN}}')
    with pytest.raises(ValueError, match=r"nan.json is no record of a rank search"):
        minimum_sufficient_rank(losses, RANKS, file=tmp_path / "nan.json")
    file = tmp_path / "notes.json"
    file.write_text(json.dumps({"mine": 1}))
    with pytest.raises(ValueError, match="notes.json is no record of a rank search"):
        minimum_sufficient_rank(Losses(), RANKS, file=file)
    assert file.read_text() == json.dumps({"mine": 1})
