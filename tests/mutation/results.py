# SPDX-License-Identifier: BSD-3-Clause
"""What the two mutation tests share: running all mutants, the tally, and results.json."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

RESULTS = Path(__file__).with_name("results.json")
WANTED = 0.9  # the share of the mutants that the tests kill

Outcome = Literal["killed", "survived", "invalid"]  # invalid: it does not compile


@dataclass
class Tally:
    """Of one file; ``left``: the survivors, and the equivalent ones with the reason."""

    counts: Counter[str] = field(default_factory=Counter)
    left: dict[str, str] = field(default_factory=dict)

    def without_survivors(self) -> Tally:
        left = {name: reason for name, reason in self.left.items() if reason}
        return Tally(self.counts - Counter(survived=self.counts["survived"]), left)

    @property
    def judged(self) -> int:
        return self.counts["killed"] + self.counts["survived"]


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
    parser.add_argument("--store", action="store_true", help=f"the tallies of whole files into {RESULTS.name}")
    parser.add_argument("--again", action="store_true", help=f"the survivors that {RESULTS.name} names, in its tallies")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="a sample: each Nth")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then, and tell of what was judged")
    arguments = parser.parse_args()
    if not arguments.list and judge(Mutant("", 0, "none", "")) != "survived":
        sys.exit("expected the tests to pass on the original")
    start = time.monotonic()
    tallies: dict[str, Tally] = {}
    wanted = [(f"{mutant.file}:{mutant.line}: {mutant.change}", mutant) for mutant in mutants]
    of_file = Counter(mutant.file for _, mutant in wanted)
    wanted = [found for found in wanted if arguments.only in found[0]][:: arguments.every]
    stored: dict[str, Tally] = {}
    if RESULTS.exists():
        for file, tally in json.loads(RESULTS.read_text()).items():
            stored[file] = Tally(Counter(tally["counts"]), tally["left"])
    if arguments.again:
        survivors = {name for tally in stored.values() for name, reason in tally.left.items() if not reason}
        wanted = [found for found in wanted if found[0] in survivors]
        tallies = {file: stored[file].without_survivors() for file in {mutant.file for _, mutant in wanted}}
    for number, (name, mutant) in enumerate(wanted):
        if arguments.list:
            print(name)
            continue
        if time.monotonic() - start > 60 * arguments.minutes:
            break
        reason = next((why for key, why in equivalent.items() if f"{mutant.file}: {mutant.change}".startswith(key)), "")
        outcome = "equivalent" if reason else judge(mutant)
        tally = tallies.setdefault(mutant.file, Tally())
        tally.counts[outcome] += 1
        if outcome in ("survived", "equivalent"):
            tally.left[name] = reason
        if outcome == "survived":
            print(f"survived: {name}", flush=True)
        if number % 25 == 24:
            print(f"... {number + 1} of {len(wanted)}", flush=True)
    if arguments.list:
        return
    for file, tally in tallies.items():
        print(f"{file}: {tally.counts['killed']} of {tally.judged} killed; {dict(tally.counts)}")
    killed = sum(tally.counts["killed"] for tally in tallies.values())
    judged = sum(tally.judged for tally in tallies.values())
    share = killed / max(judged, 1)
    minutes = (time.monotonic() - start) / 60
    print(f"{subject}: {killed} of {judged} mutants killed, {share:.1%}, in {minutes:.0f} min")
    if arguments.store:
        stored |= {file: tally for file, tally in tallies.items() if tally.counts.total() == of_file[file]}
        written = {file: vars(tally) for file, tally in sorted(stored.items())}
        RESULTS.write_text(json.dumps(written, indent=1) + "\n")
    sys.exit(share < WANTED)
