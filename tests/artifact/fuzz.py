"""Spoil artifacts and load them: what comes back is what was saved, or nothing is touched and the error is ours.

Each case spoils one copy of a small artifact in one way (`--list` names the kinds), and loads it in a forked child with
limits of time and memory. What it ends in:

- same: the model is to the bit what was saved, with the same classes and the same trainable parameters;
- training: so it is, but its output in training differs (a dropout);
- refused: by an error of this package, with nothing changed;
- different: another model came back, or one that does not run, or code of the artifact was run;
- changed: an error, but the model that was to be loaded into is not as before;
- foreign: an error that is not this package's, or a crash;
- hang, memory: a limit was reached.

The last five are failures, for which the exit status is 1. A case is the same again for the same seed.

    python tests/artifact/fuzz.py --workers 2                             # a thousand cases
    python tests/artifact/fuzz.py --kind weights "file: a pipe" --seed 1  # some kinds, by the beginnings of their names
    python tests/artifact/fuzz.py --seed 1 --case 17                      # one case, with its traceback
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
import transformers
from fuzz_artifacts import SORTS, Made, attempt, make, ways_of
from fuzz_mutations import MUTATIONS, Place
from tqdm.auto import tqdm

GOOD, BAD = ("same", "training", "refused"), ("different", "changed", "foreign", "hang", "memory")
SECONDS, MEMORY = 15.0, 3 << 29  # of one child; in bytes, beside what this process has


class Case(NamedTuple):
    """What is done: its number among those of a seed, the kind of mutation, the sort of artifact, the way to load."""

    number: int
    kind: str
    sort: str
    way: str


Answer = dict[str, Any]


def cases(seed: int, kinds: Iterable[str], sorts: Iterable[str] = SORTS) -> Iterator[Case]:
    """The endless list of a seed, without those of other kinds or sorts: a number always means the same case."""
    names, wanted, sorts = list(MUTATIONS), set(kinds), set(sorts)
    for number in range(10**6):  # enough, and an end where no kind goes with a sort
        rng = Random(f"{seed} {number}")
        kind = rng.choice(names)
        sort = rng.choice(
            [name for name in SORTS if not (kind.startswith("config.json") and SORTS[name].loader is None)]
        )
        ways = ways_of(sort)
        if not kind.startswith(("weights", "manifest", "file", "mixed")):
            ways.remove("resume")  # reads the weights alone
        case = Case(number, kind, sort, rng.choice(ways))
        if kind in wanted and sort in sorts:
            yield case


def judged(answer: Answer, accepted: list[Answer]) -> tuple[str, str]:
    """The verdict on what a child said, and what it is based on.

    Args:
        answer: of `attempt`, or {"lost": why} where the child did not live to give one.
        accepted: of `attempt` for each untouched artifact that this may be.
    """
    if "lost" in answer:
        lost: str = answer["lost"]
        return ("hang", "") if lost == "hang" else ("memory" if _no_memory(lost) else "foreign", lost)
    told = answer.get("does not run", answer)
    if _no_memory(told.get("error", "")):
        return "memory", told["error"]
    if "does not run" in answer:
        return "different", f"does not run: {told['error']}"
    if "error" in answer:
        text = f"{answer['error']} (in {answer['in']})"
        if answer["changed"]:
            return "changed", f"{', '.join(answer['changed'])}; {text}"
        return "refused" if answer["ours"] else "foreign", text
    ends = [difference(answer, one) for one in accepted]
    return min(ends, key=lambda end: ("same", "training", "different").index(end[0]))


def _no_memory(error: str) -> bool:
    return any(words in error for words in ("MemoryError", "allocate memory", "bad_alloc"))


def difference(one: Answer, other: Answer) -> tuple[str, str]:
    """Whether two loaded models are the same, and by what they can be told apart."""
    keys = [key for key in other if one[key] != other[key]]
    if not keys:
        return "same", ""
    if keys == ["training"]:
        return "training", "the output in training"
    mine, theirs = (set(map(str, found[keys[0]])) for found in (one, other))
    if keys[0] == "tensors":
        mine, theirs = (set(found["tensors"].items()) for found in (one, other))
        return "different", f"{', '.join(keys)}: {', '.join(sorted({name for name, _ in mine ^ theirs})[:3])}"
    return "different", f"{', '.join(keys)}: {', '.join(sorted(mine ^ theirs)[:3]) if keys[0] != 'output' else ''}"


# ---- children ---------------------------------------------------------------------------------------------------------

Work = Callable[[], Answer]


def in_children(
    jobs: Iterable[tuple[Any, Work]], workers: int, seconds: float = SECONDS
) -> Iterator[tuple[Any, Answer]]:
    """What each job says in a forked child, so many at a time; in the order they end.

    This process has one thread: a fork copies the locks of others, which nobody would ever release.
    """
    waiting = iter(jobs)
    running: dict[int, tuple[Any, int, float, list[bytes]]] = {}
    while True:
        while len(running) < workers and (job := next(waiting, None)) is not None:
            reader, child = start(job[1])
            running[reader] = (job[0], child, time.monotonic() + seconds, [])
        if not running:
            return
        soonest = min(end for _, _, end, _ in running.values())
        ready = select.select(list(running), [], [], max(0.0, soonest - time.monotonic()))[0]
        for reader in list(running):
            name, child, end, parts = running[reader]
            late = time.monotonic() >= end
            if reader in ready and (part := os.read(reader, 1 << 16)):
                parts.append(part)
                continue
            if reader not in ready and not late:
                continue
            os.close(reader)
            if late:
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            del running[reader]
            lost = {"lost": "hang" if late else f"the process ended with status {status}"}
            yield name, json.loads(b"".join(parts)) if parts and not late else lost


def start(work: Work) -> tuple[int, int]:
    """A child that does the work: the end of a pipe that its answer comes from, and its process id."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return reader, child
    try:
        os.close(reader)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        sys.stdin = os.fdopen(0)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            answer = json.dumps(work()).encode()
        except BaseException as error:
            answer = json.dumps({"lost": f"in the child: {error!r}"}).encode()
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(answer)
    finally:
        os._exit(0)


# ---- a run ------------------------------------------------------------------------------------------------------------


class Run:
    """Artifacts below a folder, made when they are needed, and what each is when it is untouched."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.made: dict[str, Made] = {}
        self.untouched: dict[tuple[str, str, bool], Answer] = {}

    def prepare(self, chosen: list[Case], workers: int) -> None:
        """Make what these cases need.

        Raises:
            RuntimeError: an untouched artifact does not come back as it was saved.
        """
        needed = {case.sort for case in chosen} | {_foreign(case) for case in chosen}
        for sort in (sort for sort in SORTS if sort in needed):
            (self.folder / sort).mkdir()
            self.made[sort] = make(sort, self.folder / sort)
        if threading.active_count() > 1:
            raise RuntimeError(f"Forking needs one thread, there are {threading.enumerate()}.")
        wanted = {(case.sort, case.way, twin) for case in chosen for twin in (False, "twin" in case.kind)}
        for key, answer in in_children(((key, self._plain(*key)) for key in sorted(wanted)), workers, 10 * SECONDS):
            sort, way, twin = key
            if not twin and answer.get("output") != self.made[sort].output:
                raise RuntimeError(f"An untouched artifact ({sort}) is not loaded ({way}): {answer}")
            if "output" in answer:  # a twin may not fit the model that it is loaded into
                self.untouched[key] = answer

    def _plain(self, sort: str, way: str, twin: bool) -> Work:
        made = self.made[sort]
        return lambda: attempt(way, made, made.twin if twin else made.folder)

    def spoilt(self, case: Case) -> tuple[Place, str]:
        """A copy of its artifact, spoilt, and how."""
        made, where = self.made[case.sort], Path(tempfile.mkdtemp(dir=self.folder))
        place = Place(where / "artifact", made.twin, self.made[_foreign(case)].folder)
        shutil.copytree(made.folder, place.folder)
        return place, MUTATIONS[case.kind](Random(f"{self.seed} {case.number} {case.kind}"), place)

    def results(self, chosen: list[Case], workers: int) -> Iterator[dict[str, Any]]:
        """Of each case, in the order they end."""

        def jobs() -> Iterator[tuple[tuple[Case, Place, str], Work]]:
            for case in chosen:
                place, said = self.spoilt(case)
                made = self.made[case.sort]
                yield (
                    (case, place, said),
                    lambda case=case, place=place, made=made: attempt(case.way, made, place.folder),
                )  # type: ignore[misc]

        for (case, place, said), answer in in_children(jobs(), workers):
            either = (False, True) if "twin" in case.kind else (False,)
            keys = [(case.sort, case.way, twin) for twin in either]
            verdict, why = judged(answer, [self.untouched[key] for key in keys if key in self.untouched])
            if place.ran.exists():
                verdict, why = "different", f"code of the artifact was run; {why}"
            shutil.rmtree(place.folder.parent)
            result = {**case._asdict(), "what": said, "verdict": verdict, "why": why.replace(str(self.folder), "")}
            yield result | ({"trace": answer.get("does not run", answer).get("trace")} if verdict in BAD else {})


def _foreign(case: Case) -> str:
    """The sort that a file of another one is from."""
    names = list(SORTS)
    return names[(names.index(case.sort) + 1) % len(names)] if "another sort" in case.kind else case.sort


def summary(results: list[dict[str, Any]], seed: int) -> Iterator[str]:
    """A table in Markdown: verdicts by kind; then the first case of each failure of each kind."""
    counts = Counter((one["kind"], one["verdict"]) for one in results)
    yield f"| | {' | '.join((*GOOD, *BAD))} |"
    yield f"|---|{'---:|' * len((*GOOD, *BAD))}"
    for kind in [*MUTATIONS, "all"]:
        row = [counts[kind, verdict] for verdict in (*GOOD, *BAD)]
        if kind == "all":
            row = [sum(one["verdict"] == verdict for one in results) for verdict in (*GOOD, *BAD)]
        if any(row):
            yield f"| {kind} | {' | '.join(str(number or '') for number in row)} |"
    seen = set()
    for one in sorted(results, key=lambda one: ((*GOOD, *BAD).index(one["verdict"]), one["kind"], one["number"])):
        key = one["verdict"], one["kind"]
        if one["verdict"] in BAD and key not in seen:
            seen.add(key)
            yield f"\n{one['verdict']}: {one['kind']}: {one['what']} ({one['sort']}, by {one['way']})"
            yield f"    {one['why'][:300]}".rstrip().replace("\n", " ")
            yield f"    python tests/artifact/fuzz.py --seed {seed} --case {one['number']}"


def main() -> None:
    description, _, commands = (__doc__ or "").partition("    python")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=f"    python{commands}", formatter_class=layout)
    add = parser.add_argument
    add("--cases", type=int, default=1000, help="how many (default: 1000)")
    add("--seed", type=int, default=0, help="of their choice (default: 0)")
    add("--workers", type=int, default=1, help="children at a time (default: 1)")
    add("--kind", nargs="+", metavar="NAME", default=[""], help="beginnings of names of kinds (default: all)")
    add("--sort", nargs="+", choices=list(SORTS), default=list(SORTS), help="sorts of artifacts (default: all)")
    add("--case", type=int, nargs="+", metavar="NUMBER", help="these cases only")
    add("--json", type=Path, help="file for what became of each case")
    add("--list", action="store_true", help="print the names of the kinds")
    args = parser.parse_args()
    kinds = [name for name in MUTATIONS if name.startswith(tuple(args.kind))]
    if args.list or not kinds:
        sys.exit("\n".join(MUTATIONS) if not args.list else print("\n".join(MUTATIONS)))
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread
    if args.case:
        chosen = [next(islice(cases(args.seed, MUTATIONS), number, None)) for number in args.case]
    else:
        chosen = list(islice(cases(args.seed, kinds, args.sort), args.cases))
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), args.seed)
        run.prepare(chosen, args.workers)
        results: list[dict[str, Any]] = []
        try:
            for one in tqdm(run.results(chosen, args.workers), total=len(chosen), unit="case", mininterval=5):
                results.append(one)
        except KeyboardInterrupt:
            print(f"Stopped after {len(results)} of {len(chosen)} cases.")
    results.sort(key=lambda one: one["number"])
    print("\n".join(summary(results, args.seed)))
    if args.case:
        print(json.dumps(results, indent=2))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"seed": args.seed, "cases": results}, indent=1) + "\n")
    sys.exit(any(one["verdict"] in BAD for one in results) or len(results) < len(chosen))


if __name__ == "__main__":
    main()
