"""Thousands of damaged, odd and interrupted inputs: is each refused by name, or is what comes of it right?

    python scripts/fuzz.py --cases 3000 --out scripts/results/fuzz.md

Every case starts from something intact (a small model with SAEs, cards, states and images, made here from a seed),
changes one thing, and does what a user would do with it. What may happen:

- refused: a `ValueError` (`CheckpointError` among them) or `FileNotFoundError` that names the file, argument or text;
- right: the same result as without the change, or, where the change makes another valid input, finite numbers.

What may not: another exception, a result that is neither, or more than the time limit. A case is told by its family,
its number and the seed, so that each can be run alone: `--family cards --only 17`.
"""

import argparse
import atexit
import faulthandler
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fuzz_files import FAMILIES as FILES
from fuzz_runs import FAMILIES as RUNS
from fuzz_things import Bench, Refused, Wrong

FAMILIES: dict[str, tuple[Callable[[random.Random, Bench], str], int]] = {**FILES, **RUNS}
OUTCOMES = ("right", "refused by name", "wrong exception", "silent", "hung")
LIMIT = 20.0  # seconds of the processor for one case
PART = 60  # cases that a process runs before it asks for more
REFUSALS = (ValueError, FileNotFoundError, IndexError)


class Hung(BaseException):
    """A case took longer than it may."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `Hung` in what takes more of the processor, or ten times as long by the clock, as where it waits."""

    def stop(*_: Any) -> None:
        raise Hung

    clocks = {signal.ITIMER_PROF: (signal.SIGPROF, seconds), signal.ITIMER_REAL: (signal.SIGALRM, 10 * seconds)}
    before = {number: signal.signal(number, stop) for number, _ in clocks.values()}
    for clock, (_, limit) in clocks.items():
        signal.setitimer(clock, limit)
    faulthandler.dump_traceback_later(20 * seconds, exit=True)  # where no signal reaches it
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for clock, (number, _) in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])


def outcome(family: str, number: int, seed: int, bench: Bench) -> tuple[str, str]:
    """Run one case; return what happened, and a line that tells it."""
    told = f"{family} {number}"
    bench.told = ""
    try:
        with within(LIMIT * (10 if family == "kills" else 1)):  # which starts three processes
            told += f": {FAMILIES[family][0](random.Random(f'{seed} {family} {number}'), bench)}"
        return "right", told
    except Refused as refusal:
        return "refused by name", f"{told}: {refusal}"
    except Wrong as wrong:
        return "silent", f"{told}: {bench.told}: {wrong}"
    except Hung:
        return "hung", f"{told}: {bench.told}"
    except REFUSALS as error:
        return "refused by name", f"{told}: {bench.told}: {type(error).__name__}: {error}"
    except (Exception, KeyboardInterrupt) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(where.filename).name}:{where.lineno}"
        return "wrong exception", f"{told}: {bench.told}: {type(error).__name__} at {at}: {str(error)[:200]}"


def shares(cases: int) -> dict[str, int]:
    """Divide the cases over the families by their weights, at least one each."""
    total = sum(weight for _, weight in FAMILIES.values())
    return {name: max(1, round(cases * weight / total)) for name, (_, weight) in FAMILIES.items()}


def campaign(cases: int, seed: int, workers: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Run all families in some processes; return their outcomes, and a line for each that may not be."""
    found, bad = {family: Counter() for family in FAMILIES}, []
    parts = [
        (family, range(start, min(start + PART, n)), seed)
        for family, n in shares(cases).items()
        for start in range(0, n, PART)
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _begin, (seed,)) as pool:
        for (family, *_), lines in zip(parts, pool.map(_part, parts), strict=True):
            for what, line in lines:
                found[family][what] += 1
                if what in OUTCOMES[2:]:
                    bad.append(f"{what}: {line}")
                    print(bad[-1], flush=True)
    return found, bad


_bench: list[Bench] = []  # of a process of the campaign


def _begin(seed: int) -> None:
    """Make what a process starts from, in a folder that goes with it."""
    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    _bench.append(Bench(Path(folder.name), seed))


def _part(part: tuple[str, range, int]) -> list[tuple[str, str]]:
    family, numbers, seed = part
    return [outcome(family, number, seed, _bench[0]) for number in numbers]


def table(found: dict[str, Counter[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| family | cases | {' | '.join(OUTCOMES)} |", f"|---|{'---|' * (len(OUTCOMES) + 1)}"]
    for family, counts in [*found.items(), ("all", sum(found.values(), Counter()))]:
        cells = [counts.total(), *(counts[one] for one in OUTCOMES)]
        lines.append(f"| {family} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the campaign, or one case; the exit code tells whether all was as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--family", choices=FAMILIES, help="run a case of this one alone, --only")
    parser.add_argument("--only", type=int, help="which")
    parser.add_argument("--out", type=Path, help="write the table here")
    args = parser.parse_args()
    if args.only is not None:
        _begin(args.seed)
        print(*outcome(args.family, args.only, args.seed, _bench[0]), sep=": ")
        return 0
    began = time.perf_counter()
    found, bad = campaign(args.cases, args.seed, args.workers)
    seconds = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    took = f"{seconds:.0f} s with {args.workers} processes on {os.cpu_count()} cores, {cpu:.0f} s of the processor."
    text = f"{table(found)}\n\n{took}\n"
    print(text)
    if args.out is not None:
        head = "# What damaged, odd and interrupted inputs do\n\nMade by `python scripts/fuzz.py"
        args.out.write_text(f"{head} --cases {args.cases} --seed {args.seed}`, which says what is counted.\n\n{text}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
