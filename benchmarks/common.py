"""What every benchmark shares: runs in parallel, machine and versions, JSON that is never half a file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

from tqdm.auto import tqdm

Key = TypeVar("Key")
Result = TypeVar("Result")

_PACKAGES = ("hf-lottalora", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "scipy")


def environment() -> dict[str, Any]:
    """Machine and versions: what a reader needs to judge a figure, and nothing that identifies the machine's owner.

    Example:
        >>> sorted(environment())
        ['accelerators', 'commit', 'cores', 'cpu', 'date', 'memory_gib', 'platform', 'python', 'threads', 'versions']
    """
    import torch

    accelerators = []
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        module = getattr(torch, kind.type if kind else "cuda")
        for index in range(torch.accelerator.device_count()):
            name = module.get_device_name(index) if hasattr(module, "get_device_name") else str(kind)
            accelerators.append(name)
    return {
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "accelerators": accelerators,
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def run_jobs(
    work: Callable[..., Result], jobs: Mapping[Key, tuple[Any, ...]], workers: int
) -> Iterator[tuple[Key, Result]]:
    """`(key, work(*jobs[key]))` for each job, as they finish: with one worker in this process and in order.

    Raises:
        Exception: what a job raised; those that have not begun are dropped.
    """
    with tqdm(total=len(jobs), unit="run") as bar:
        if workers == 1:
            for key, job in jobs.items():
                yield key, work(*job)
                bar.update()
            return
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        try:
            futures = {pool.submit(work, *job): key for key, job in jobs.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
                bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def mean_and_std(values: Sequence[float], digits: int = 2) -> str:
    """`mean ± standard deviation` for a table; of one value only that.

    Example:
        >>> mean_and_std([1.0, 2.0, 3.0])
        '2.00 ± 1.00'
    """
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


@contextmanager
def kept_for_backward(model: Any, there: Iterable[Any] = ()) -> Iterator[dict[int, int]]:
    """Of what autograd keeps for backward of a forward pass within, the bytes of each storage.

    Parameters, and what else is `there` anyway, are not counted.
    """
    import torch

    parameters = {parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *there)}
    storages: dict[int, int] = {}
    alive = []  # the address of a freed storage could come back

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor.detach()  # an output that is saved with its graph would hold itself for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write `data` as indented JSON, creating the folder; a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: str | os.PathLike[str]) -> Any:
    """What `write_json` wrote there, or None where there is no such file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this folder, with a `+` where files that git tracks were changed since."""
    folder = Path(__file__).parent
    try:
        found = [
            subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for args in (
                ("rev-parse", "--short=10", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "../src", "*.py"),
            )
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return found[0] + ("+" if found[1] else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
