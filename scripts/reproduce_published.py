"""Set the paper's numbers on the published language models beside what their checkpoints on the Hub give.

    python scripts/reproduce.py published --out runs/published --models ts-medium fw-small fw-medium

loads each model and its SAEs from the Hub (or its cache), and measures (2410.08417): the model's loss and what its
SAEs add to it (appendix G), the negation circuit of ts-medium (figure 8), how well a few eigenvectors predict output
features (figure 9), SAEs trained ever longer (appendix H), effective ranks, and the ranking of features of the authors'
tutorial. It prints one table of (claimed, measured, why they may differ) and writes `--out`/page.html with figures.

What is in `--out` and was measured of the same weights, SAEs and text, and as it is measured here, is not measured
again. What the Hub does not have is said in its row, and the exit status is 1.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from corpora import open_corpus
from published_measures import CODE, Measurement, measurements
from published_page import Row, rows_of, write_page
from published_studies import STUDIES, Subject
from tqdm import tqdm

from bilens.tensor.keeping import read_record, write_record

CORPORA = {"tinystories": "roneneldan/TinyStories:validation", "fineweb": "HuggingFaceFW/fineweb:train"}
FILES = {".parquet", ".json", ".jsonl", ".txt", ".csv"}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--out", type=Path, default=Path("runs/published"), help="folder for results and the page")
    for name, default in CORPORA.items():
        parser.add_argument(
            f"--{name}", default=default, help=f"a file or Hub dataset with a column `text` ({default})"
        )
    parser.add_argument("--sequences", type=int, default=256, help="windows of text, each as long as the context")
    parser.add_argument("--revision", action="append", default=[], metavar="REPO=REVISION", help="for a repository")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    if args.sequences < 1:
        parser.error(f"--sequences must be at least 1, got {args.sequences}")
    for name in CORPORA:
        path = Path(getattr(args, name))
        if path.suffix in FILES and not path.is_file():
            parser.error(f"--{name} must be a file or a Hub dataset, got {path}, which does not exist")
    if bad := [one for one in args.revision if one.count("=") != 1]:
        parser.error(f"--revision must be REPO=REVISION, got {bad[0]!r}")
    args.revision = dict(one.split("=") for one in args.revision)
    return args


class Store:
    """Results in a folder, each with what it depends on; one that depends on something else is measured again."""

    def __init__(self, folder: Path):
        self.folder = folder

    def once(self, key: str, about: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """Return a result, measured if it is not there yet."""
        path = self.folder / f"{key}.json"
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        if (stored := read_record(path)).get("hash") == digest:
            return stored["result"]
        result = json.loads(json.dumps(measure()))  # as it will be read
        write_record(path, {"hash": digest, "about": about, "result": result})
        return result


def read_texts(name: str, n: int) -> list[str]:
    """Return the first n distinct texts of a corpus."""
    rows = (row["text"] for row in open_corpus(name, streaming=True))
    return list(islice(dict.fromkeys(text for text in islice(rows, 4 * n) if text), n))


def measure(subject: Subject, one: Measurement, store: Store, model: str) -> Any:
    """Measure one thing, or return what was measured of the same weights, SAEs and text."""
    about = subject.provenance(one.saes) | {"code": CODE}
    key = f"{model}/{one.name}"
    part = lambda name, run: store.once(f"{key}.parts/{name}", about, run)  # noqa: E731
    return store.once(key, about, partial(one.run, subject, part))


def rows(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> Iterator[Row]:
    """Yield the rows of the table, and fill in the results by model; what the Hub lacks is a row that says so."""
    store = Store(args.out / "results")
    for model in args.models:
        study = STUDIES[model]
        texts = read_texts(getattr(args, study.corpus), args.sequences)
        subject = Subject(study, texts, args.sequences, args.device, args.revision)
        _ = subject.model  # without it there is nothing to measure
        results[model] = {}
        for one in tqdm(list(measurements(study)), desc=model, leave=False):
            try:
                found = measure(subject, one, store, model)
            except FileNotFoundError as error:
                yield Row(model, one.name, "", "not measured", str(error))
                continue
            results[model][one.name] = found
            yield from rows_of(model, study, one.name, found)


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, print the table and write the page."""
    args = parse_args(arguments)
    results: dict[str, dict[str, Any]] = {}
    try:
        table = list(rows(args, results))
    except FileNotFoundError as error:
        sys.exit(f"reproduce.py published: {error}")
    print("| model | what | claimed | measured | why they may differ |\n|---|---|---|---|---|")
    for row in table:
        print(f"| {' | '.join(row)} |")
    print(write_page(args.out / "page.html", table, results))
    if missing := [row for row in table if row.measured == "not measured"]:
        sys.exit(f"{len(missing)} of {len(table)} rows were not measured: {missing[0].why}")


if __name__ == "__main__":
    main()
