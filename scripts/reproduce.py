"""Set the papers' numbers beside numbers measured here: `python scripts/reproduce.py language --help`, `... images`."""

import sys
from importlib import import_module
from pathlib import Path

PARTS = sorted(path.stem.removeprefix("reproduce_") for path in Path(__file__).parent.glob("reproduce_*.py"))


def main() -> None:
    """Run `reproduce_PART.py` with the remaining arguments."""
    if sys.argv[1:2] in (["-h"], ["--help"], []):
        sys.exit(f"{__doc__}\n\nusage: reproduce.py {{{','.join(PARTS)}}} ...")
    if sys.argv[1] not in PARTS:
        sys.exit(f"the part must be one of {', '.join(PARTS)}, got {sys.argv[1]!r}")
    import_module(f"reproduce_{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
