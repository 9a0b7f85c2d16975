"""The independent runs of a benchmark, one after another or several at a time in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, TypeVar

from tqdm.auto import tqdm

Key = TypeVar("Key")
Result = TypeVar("Result")


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
