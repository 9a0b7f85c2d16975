"""Minimum sufficient rank on MNIST by the library's search (paper section 3, finding 3: it saturates at 16 to 32).

The loss is the error on the validation images, in percent, of the medium network trained as in `mnist.py` with
alpha = r. Writes the search's record, a table, and a plot beside it. Finished runs are kept.

    python benchmarks/paper/mnist_rank_search.py                # eps = 0.5 points
    python benchmarks/paper/mnist_rank_search.py --quick        # seconds, to see that it runs
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from cli import RESULTS as FOLDER
from cli import new_parser, results_so_far, seeds_of, write_json
from mnist import Cell, load_data, parse_mnist, run

from hf_lottalora import minimum_sufficient_rank

RESULTS = FOLDER / "mnist_rank_search.json"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64], help="default: 1 to 64")
    parser.add_argument("--epsilon", type=float, default=0.5, help="points of error (default: 0.5)")
    args = parse_mnist(parser, RESULTS)
    if args.workers > 1:
        parser.error("each run of the search depends on those before it: pass --threads instead of --workers")
    result = results_so_far(args, preset="medium", epsilon=args.epsilon)
    load_data(args)

    def validation_error(rank: int, seed: int) -> float:
        cell = Cell("medium", "lottalora" if rank else "full", rank, "r" if rank else "")
        found = run(cell, seed, args)
        return 100 * (1 - found["validation_accuracy"][-1])

    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / args.output.name if args.quick else args.output
        record = output.with_name(f"{output.stem}_runs.json")
        seeds = seeds_of(args)
        search = minimum_sufficient_rank(validation_error, args.ranks, args.epsilon, seeds, record)
        write_json(output, {**result, "rank": search.rank, "runs": search.losses})
        search.plot(output.with_suffix(".png"))
    print(search)


if __name__ == "__main__":
    main()
