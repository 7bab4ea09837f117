# SPDX-License-Identifier: BSD-3-Clause
"""What the two mutation tests share: running all mutants, the tally, and results.json."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

RESULTS = Path(__file__).with_name("results.json")
WANTED = 0.9  # the share of the mutants that the tests kill

Outcome = Literal["killed", "survived", "invalid"]  # invalid: it does not compile


class Mutant(NamedTuple):
    file: str
    line: int
    change: str  # readable, and its name in a list of equivalent ones
    source: str  # empty: the original


def main(
    subject: str, mutants: Iterable[Mutant], judge: Callable[[Mutant], Outcome], equivalent: Mapping[str, str]
) -> None:
    """Judges every mutant, prints the survivors and the tally, and fails where too few are killed.

    Args:
        equivalent: reasons by the beginning of ``FILE: change``; such a mutant is neither run nor counted.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="those whose file, line or change contains this")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--store", action="store_true", help=f"the tally into {RESULTS.name}")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="a sample: each Nth")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then, and tell of what was judged")
    arguments = parser.parse_args()
    if not arguments.list and judge(Mutant("", 0, "none", "")) != "survived":
        sys.exit("expected the tests to pass on the original")
    start = time.monotonic()
    counts = {"killed": 0, "survived": 0, "invalid": 0, "equivalent": 0}
    survivors = []
    wanted = ((f"{mutant.file}:{mutant.line}: {mutant.change}", mutant) for mutant in mutants)
    wanted = (found for found in wanted if arguments.only in found[0])
    for name, mutant in itertools.islice(wanted, 0, None, arguments.every):
        if arguments.list:
            print(name)
            continue
        if time.monotonic() - start > 60 * arguments.minutes:
            break
        known = any(f"{mutant.file}: {mutant.change}".startswith(key) for key in equivalent)
        outcome = "equivalent" if known else judge(mutant)
        counts[outcome] += 1
        if sum(counts.values()) % 25 == 0:
            print(f"... {mutant.file}:{mutant.line}, {counts}", flush=True)
        if outcome == "survived":
            survivors.append(name)
            print(f"survived: {name}", flush=True)
    if arguments.list:
        return
    judged = counts["killed"] + counts["survived"]
    share = counts["killed"] / judged if judged else 0.0
    minutes = (time.monotonic() - start) / 60
    print(f"{subject}: {counts['killed']} of {judged} mutants killed, {share:.1%}, in {minutes:.0f} min; {counts}")
    if arguments.store:
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        stored[subject] = {**counts, "survivors": survivors, "reasons": dict(equivalent)}
        RESULTS.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
    sys.exit(share < WANTED)
