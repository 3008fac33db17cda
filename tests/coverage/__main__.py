"""Survey all families by all exporters, and write docs/coverage.md.

``make coverage`` runs this; what is interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from tests.coverage.page import defects, page
from tests.coverage.survey import kept, pairs, survey

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


def main() -> int:
    """Returns 1 where a trick gave a wrong answer, crashed, or missed what it should find."""
    parser = argparse.ArgumentParser(prog="make coverage", description=__doc__)
    parser.add_argument("families", nargs="*", help="all where none are given")
    parser.add_argument("--exporters", default="", help="comma between; all where none are given")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--page", action="store_true", help="write the page of what there is")
    given = parser.parse_args()
    exporters = [given.exporters.split(",")] if given.exporters else []
    wanted = pairs(given.families, *exporters)
    folder = Path(os.environ.get("ONNX_TRICKS_CACHE", ".cache")) / "coverage"
    with tqdm(total=len(wanted), unit="export", disable=given.page) as bar:

        def told(line: str) -> None:
            bar.write(line)
            bar.update()

        cells = kept(folder) if given.page else survey(wanted, folder, jobs=given.jobs, told=told)
    found = list(dict.fromkeys(defects(cells)))
    print(*found, f"{len(found)} defects", sep="\n")
    if given.page or not (given.families or given.exporters):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(kept(folder)))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
