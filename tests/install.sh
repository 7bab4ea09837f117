#!/usr/bin/env bash
# Each way to install from source, into an environment of its own, and from outside the tree an import and a call.
# Takes two environments to borrow packages from, so that no torch is installed for this: one with all that a build
# needs, and one to run what the isolated build made. That build fetches the torch that requirements/constraints-third.txt
# names, whose download is small.
# Without the CUDA kernels: the wheel that the other tests install has them, and they take minutes to compile.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$(realpath "$1") second=$(realpath "$2")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH="$tools/bin:$PATH"

CHECK='
import pathlib, sys, torch, sdgp, sdgp_cli
assert sdgp.prune_nm(torch.tensor([3.0, -1.0, 0.5, -4.0]), 2, 4).tolist() == [3, 0, 0, -4]
library = pathlib.Path(sdgp._load.C.__file__)
assert library.is_relative_to(sys.prefix), f"expected the library of this environment, got {library}"
print(f"ok: sdgp {sdgp.__version__} from {sdgp.__file__}, torch {torch.__version__}")
'

install() { # name, environment to borrow from, arguments of pip install
  echo "--- $1: pip install ${*:3}"
  "$tools/bin/python" -m venv "$work/$1"
  (cd "$2" && realpath lib/python*/site-packages) > "$(echo "$work/$1"/lib/python*/site-packages)/borrowed.pth"
  timeout 900 "$work/$1/bin/pip" install --quiet -C cmake.define.SDGP_CUDA=OFF "${@:3}"
  (cd "$work" && "$1/bin/python" -c "$CHECK")
}

# What is released, and nothing that git does not know.
"$tools/bin/python" -m build --sdist --no-isolation --outdir "$work" . > "$work/log" || { cat "$work/log"; exit 1; }
sdist=$(echo "$work"/sdgp-*.tar.gz)
if git rev-parse --git-dir > /dev/null 2>&1; then
  comm -13 <({ git ls-files; echo PKG-INFO; } | sort) <(tar tf "$sdist" | sed 's|^[^/]*/||' | sort) > "$work/stray"
  [ ! -s "$work/stray" ] || { echo "the sdist has files that git does not track:"; cat "$work/stray"; exit 1; }
fi

# Older pips read the first for the build's environment too, newer ones the second.
PIP_CONSTRAINT=$PWD/requirements/constraints-third.txt PIP_BUILD_CONSTRAINT=$PWD/requirements/constraints-third.txt \
  install isolated "$second" "$sdist"
# One build folder for both: the kernels are compiled once.
install shared "$tools" --no-build-isolation -C build-dir="$work/build" .
install editable "$tools" --no-build-isolation -C build-dir="$work/build" -e .
