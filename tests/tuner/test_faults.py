"""A rank that is killed, or hangs: the others come to an end by themselves, and say why."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import faults_worker
import pytest
from accelerate.utils import compare_versions

pytestmark = [
    pytest.mark.smoke,  # a launch takes half a minute, and the time that a rank waits for another one as long
    pytest.mark.skipif(compare_versions("accelerate", "<", "1.15"), reason="FSDP2 is refused with it"),
]

Ranks = tuple[Path, list["subprocess.Popen[str]"]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ranks]]:
    """Two ranks of every case, at once: most of their time they wait."""
    found = {}
    for case in faults_worker.CASES:
        folder = tmp_path_factory.mktemp("fault")
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        command = [sys.executable, Path(__file__).parent / "faults_worker.py", folder, case]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        found[case] = folder, [subprocess.Popen(command, env=env, **pipes) for env in ranks]  # type: ignore[call-overload]
    yield found
    for _, processes in found.values():
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("case", faults_worker.CASES)
def test_the_other_rank_ends_within_a_minute(launched: dict[str, Ranks], case: str) -> None:
    folder, (rank, _) = launched[case]
    for _ in range(300):
        if (folder / "fault").exists() or rank.poll() is not None:
            break
        time.sleep(1)
    assert (folder / "fault").exists(), rank.communicate()[1][-3000:]
    _, errors = rank.communicate(timeout=60)
    assert rank.returncode not in (0, None) and not (folder / "finished").exists()
    assert "Timed out waiting" in errors or "remote worker" in errors
    assert not (folder / "saved").exists()
