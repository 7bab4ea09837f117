# SPDX-License-Identifier: BSD-3-Clause
"""Tests runs that are killed, lose a worker or a process, or cannot write.

No file may be broken, the error must name the cause, and --resume must end where an unbroken run ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import ROOT, command, fails, lines, run, saved

import sdgp
from recipes.common import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

HERE = Path(__file__).parent

# File operations of a run of two epochs. Each epoch writes, syncs and renames metrics and checkpoint, and syncs their
# folder. The result is saved in the same way, then appended to the results.
WRITES = 2 * (4 + 4) + 4 + 1


def python(*words: object, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, **paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "kind", "count"),
    [("cifar10", "calls", 14), ("gpt", "calls", 6), ("cifar10", "writes", 0), ("cifar10", "clock", 4)],
)
def test_killed_at_any_point(recipe: str, kind: str, count: int, images: Path, tmp_path: Path) -> None:
    words = command(recipe, tmp_path, images)
    out = words.index("--out")
    if recipe == "gpt":  # otherwise every point reads the standard library twice
        (tmp_path / "text").write_bytes(b"to be or not to be, " * 2000)
        words += ["--data", str(tmp_path / "text")]
    done = python(HERE / "kills.py", kind, count, tmp_path, *words[:out], *words[out + 2 :])
    assert done.returncode == 0, done.stderr
    unbroken, *points = map(json.loads, done.stdout.splitlines())
    assert len(points) == (count or WRITES)
    assert unbroken["epochs"] == [1, 2]
    assert unbroken["kept"]
    assert not unbroken["left over"]
    for number, point in enumerate(points):
        assert point["killed"] or kind == "clock", number
        assert point["resumed"] == 0, number
        assert point["left"] == unbroken, number
        # Only a file that is appended to in place can be cut in half, and only if the kill comes within the call that
        # appends.
        assert not point["broken"] or (kind == "writes" and number == WRITES - 1), number
    assert kind == "clock" or len({point["saved"] for point in points}) > 1  # some before the first save, some after


def test_a_line_is_written_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed between the result line and the note of it must not write the line again."""
    run(monkeypatch, command("gpt", tmp_path, images))
    (kept,) = tmp_path.glob("*/*/seed0/result.json")
    kept.unlink()
    run(monkeypatch, command("gpt", tmp_path, images, "--resume"))
    assert len(lines(tmp_path)) == 1
    assert kept.exists()


@pytest.mark.parametrize("recipe", ["cifar10", "gpt"])
def test_a_folder_that_cannot_be_written(
    recipe: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    said = fails(monkeypatch, command(recipe, file / "out", images))
    folder = file / "out" / recipe / "mvue_2_4" / "seed0"
    assert said == f"{recipe}: --out: expected a folder that can be written, got {folder}: Not a directory"
    assert file.read_text() == "no folder"


def on_a_disk(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Runs a shell script that may mount disks. Only this script sees them."""
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-e", "-c"]
    if subprocess.run([*unshare, "mount -t tmpfs tmpfs /mnt"], capture_output=True).returncode != 0:
        pytest.skip("this system lets nobody mount a disk of their own")
    return subprocess.run([*unshare, script, "sh", *map(str, words)], cwd=ROOT, capture_output=True, text=True)


# Run on a disk of the given size, then again after the disk has grown.
FULL = """
mount -t tmpfs -o size="$1" tmpfs "$2"
disk=$2
shift 2
! "$@"
cp -r "$disk" "$disk.full"
mount -o remount,size=64m "$disk"
"$@" --resume
cp -r "$disk" "$disk.resumed"
"""


def test_a_full_disk(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdgp.chooser.forget()  # a checkpoint contains the measurements of this process
    run(monkeypatch, command("cifar10", tmp_path / "unbroken", images))
    room = saved(tmp_path / "unbroken").stat().st_size * 3 // 2  # fits one checkpoint, but not a second one
    disk = tmp_path / "disk"
    disk.mkdir()
    done = on_a_disk(FULL, room, disk, sys.executable, "-m", *command("cifar10", disk, images))
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"cifar10: checkpoint: could not be saved as {disk}/cifar10/mvue_2_4/seed0/")
    assert "No space left on device" in said
    assert said.endswith("; the previous checkpoint remains")
    assert checkpoint.load(saved(tmp_path / "disk.full")).training["step"] == 3
    assert not list((tmp_path / "disk.full").rglob("*.tmp"))
    weights = [checkpoint.load(saved(tmp_path / name)).weights for name in ("unbroken", "disk.resumed")]
    assert weights[0].keys() == weights[1].keys()
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []


def test_a_read_only_disk(images: Path, tmp_path: Path) -> None:
    words = command("cifar10", tmp_path / "out", images)
    done = on_a_disk('mount -t tmpfs -o ro tmpfs "$1"; shift; "$@"', tmp_path, sys.executable, "-m", *words)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"cifar10: --out: expected a folder that can be written, got {tmp_path}/out")
    assert said.endswith(": Read-only file system")


WORKER = """
import importlib, os, signal, sys
from recipes.imagenet.data import _Decoded

get = _Decoded.__getitem__
def killed(self, index):
    if index == 5 and not os.environ.get("SPARED"):
        os.kill(os.getpid(), signal.SIGKILL)
    return get(self, index)
_Decoded.__getitem__ = killed
sys.argv = sys.argv[1:]
importlib.import_module(sys.argv[0]).main()
"""


@pytest.mark.slow
def test_a_dying_worker_is_named(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command("imagenet", tmp_path, images, "--set", "workers=1")
    done = python("-c", WORKER, *words)
    assert done.returncode != 0
    assert "DataLoader worker" in done.stderr
    assert "killed by signal: Killed" in done.stderr
    monkeypatch.setenv("SPARED", "1")
    done = python("-c", WORKER, *words, "--resume")
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(saved(tmp_path)).training["step"] == 6


RANK = """
import importlib, os, signal, sys
from recipes.common.run import Run

after_step = Run._end_step
def killed(self, step, *arguments):
    if step == 4 and os.environ["RANK"] == "1" and "--resume" not in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    return after_step(self, step, *arguments)
Run._end_step = killed
sys.argv = sys.argv[1:]
importlib.import_module(sys.argv[0]).main()
"""


@pytest.mark.slow
def test_a_dying_rank_ends_the_run_and_it_resumes(images: Path, tmp_path: Path) -> None:
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, program]
    words = command("gpt", tmp_path / "out", images)
    done = python(*torchrun, *words)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert checkpoint.load(saved(tmp_path / "out")).training["step"] == 3  # the first epoch's checkpoint
    done = python(*torchrun, *words, "--resume")
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(saved(tmp_path / "out")).training["step"] == 6
    assert len(lines(tmp_path / "out")) == 1
