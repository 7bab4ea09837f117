#!/usr/bin/env bash
# Installs from source in each way into a separate environment, then imports and calls sdgp from outside the tree.
#
# Takes two environments to borrow packages from, so that no torch is installed. The first has all that a build needs.
# The second runs the result of the isolated build, which downloads the small torch of
# requirements/constraints-third.txt.
#
# Builds without optimization and without the CUDA kernels, which takes a fifth of the time. The wheel that the other
# tests install has both.
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
  timeout 900 "$work/$1/bin/pip" install --quiet -C cmake.build-type=Debug -C cmake.define.SDGP_CUDA=OFF "${@:3}"
  (cd "$work" && "$1/bin/python" -c "$CHECK")
}

# The sdist must hold only files that git tracks.
"$tools/bin/python" -m build --sdist --no-isolation --outdir "$work" . > "$work/log" || { cat "$work/log"; exit 1; }
sdist=$(echo "$work"/sdgp-*.tar.gz)
if git rev-parse --git-dir > /dev/null 2>&1; then
  comm -13 <({ git ls-files; echo PKG-INFO; } | sort) <(tar tf "$sdist" | sed 's|^[^/]*/||' | sort) > "$work/stray"
  [ ! -s "$work/stray" ] || { echo "the sdist has files that git does not track:"; cat "$work/stray"; exit 1; }
fi

# Old versions of pip also read the first variable for the build environment, new versions the second.
PIP_CONSTRAINT=$PWD/requirements/constraints-third.txt PIP_BUILD_CONSTRAINT=$PWD/requirements/constraints-third.txt \
  install isolated "$second" "$sdist"
# Both installs share one build folder, so the kernels are compiled once.
install shared "$tools" --no-build-isolation -C build-dir="$work/build" .
install editable "$tools" --no-build-isolation -C build-dir="$work/build" -e .
