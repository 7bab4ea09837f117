# SPDX-License-Identifier: BSD-3-Clause
"""The measurements of gpu_report.py. Each subject prints its rows while it runs, and is stored when it ends.

    prune_nm       GB/s read and written, compared with clone()
    pack           prune and pack to 2:4, compared with clone(), PyTorch's compressor and its 4 x 4 tile kernel
    gradients      both sparse products of a linear layer, packing included, compared with the exact ones
    train_step     whole steps: plain, sparse forced, auto; and their peak memory

Each result is the median of 11 rounds; every round runs all candidates. The bounds next to the measurements assume the
bandwidth of a large copy, and the rate of a large dense product, doubled where two of four values are skipped.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import models
import torch
import torch.nn.functional as F
from bench import MEASURED, RESULTS, ROOT, store
from torch import Tensor, nn

import sdgp
from sdgp import Pattern, _semi_structured
from sdgp._machine import machine
from sdgp._ops import pack_24

PATTERNS = ("2:4", "1:4", "1:8", "2:8", "4:8", "2:16", "4:16", "8:16", "4:32", "8:32", "16:32")
METHODS = ("magnitude", "rescale", "rescale_group", "random", "mvue")
ROUNDS = 11
TURN_MS = 2.0  # milliseconds of work between two readings of the clock
CUDA = torch.device("cuda")
PACKED = (16384, 8192)  # 256 MiB of 16-bit values
SQUARE = 8192  # the side of the product that shows what the GPU can do

Row = dict[str, Any]


class OutOfTime(Exception):
    pass


class Clock:
    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise OutOfTime


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Returns the median milliseconds of each candidate by CUDA events. Every round runs all candidates."""

    def turn(call: Callable[[], Any], calls: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        call()  # keeps the GPU busy while the timed launches queue up
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    calls = {name: min(50, 1 + int(TURN_MS / max(turn(call, 1), 1e-3))) for name, call in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(turn(call, calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


# prune_nm


def prune_nm(mib: int) -> Iterator[Row]:
    for dtype in (torch.bfloat16, torch.float32):
        rows = torch.randn(mib * 2**20 // dtype.itemsize // 4096, 4096, device=CUDA).to(dtype)
        for name, x, dim in (("(rows, 4096)", rows, -1), ("NCHW (N, 256, 32, 32)", rows.view(-1, 256, 32, 32), 1)):
            for pattern in PATTERNS:
                settings = (*Pattern.parse(pattern), dim)
                times = interleaved(
                    {"clone": x.clone} | {method: partial(sdgp.prune_nm, x, *settings, method) for method in METHODS}
                )
                yield {
                    "tensor": name,
                    "dtype": str(dtype)[6:],
                    "mib": mib,
                    "pattern": pattern,
                    "gb_per_s": {key: round(2 * x.nbytes / ms / 1e6) for key, ms in times.items()},
                    "of_clone": {key: round(times["clone"] / ms, 3) for key, ms in times.items() if key != "clone"},
                }


def show_prune_nm(row: Row) -> str:
    shares = "  ".join(f"{name} {share:4.0%}" for name, share in row["of_clone"].items())
    head = f"prune_nm | {row['tensor']:21s} {row['dtype']:8s} | {row['pattern']:>5s}"
    return f"{head} | clone {row['gb_per_s']['clone']:5d} GB/s | {shares}"


# pack


def pack() -> Iterator[Row]:
    x = torch.randn(*PACKED, device=CUDA).bfloat16()
    layout = _semi_structured.metadata_layout(x.device.index, x.dtype)
    pruned = sdgp.prune_nm(x, 2, 4)
    for pattern in ("2:4", "1:4", "1:8", "2:8", "2:16"):
        n, m = Pattern.parse(pattern)
        candidates: dict[str, Callable[[], Any]] = {"clone": x.clone}
        if layout is not None:
            candidates |= {method: partial(pack_24, x, n, m, method, None, layout) for method in METHODS}
            candidates |= {
                f"columns {method}": partial(pack_24, x.t(), n, m, method, None, layout) for method in METHODS
            }
        if torch.backends.cusparselt.is_available():
            candidates["_cslt_compress"] = partial(torch._cslt_compress, pruned)
            candidates["4x4 tile"] = partial(torch._sparse_semi_structured_tile, x, use_cutlass=False)
        times = interleaved(candidates)
        ratios = {name: round(ms / times["clone"], 3) for name, ms in times.items() if name != "clone"}
        moved = x.nbytes + x.nbytes // 16 * 9
        yield {
            "shape": list(x.shape),
            "pattern": pattern,
            "layout": layout,
            "clone_ms": round(times["clone"], 4),
            "times_clone": ratios,
            "times_clone_at_the_bound": round(moved / (2 * x.nbytes), 3),
        }


def show_pack(row: Row) -> str:
    ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["times_clone"].items())
    head = f"pack     | {row['pattern']:>5s} | clone {row['clone_ms']:.3f} ms"
    return f"{head} | {ratios} (bound {row['times_clone_at_the_bound']}x)"


# gradients

# model: (numbers of tokens, the two widths of the feed-forward)
MLPS = {
    "ViT-B": ((12608, 50432), (768, 3072)),
    "ViT-L": ((12608, 50432), (1024, 4096)),
    "GPT-2": ((16384,), (768, 3072)),
    "Llama-3-8B": ((4096, 16384), (4096, 14336)),
    "Llama-13B": ((4096, 16384), (5120, 13824)),
    "Llama-70B": ((4096, 16384, 65536), (8192, 28672)),
}
# (model, tokens, in, out)
LINEARS = [
    *(
        (model, count, *shape)
        for model, (tokens, mlp) in MLPS.items()
        for count in tokens
        for shape in (mlp, mlp[::-1])
    ),
    ("GPT-2", 16384, 768, 2304),
    ("Llama-3-8B", 4096, 4096, 4096),
    ("Llama-3-8B", 16384, 4096, 4096),
    ("ResNet-50 1x1", 64 * 56**2, 64, 256),
    ("ResNet-50 1x1", 64 * 28**2, 512, 128),
    ("ResNet-50 1x1", 64 * 14**2, 1024, 256),
]


def gradients() -> Iterator[Row]:
    square = torch.randn(SQUARE, SQUARE, device=CUDA).bfloat16()
    large = square.repeat(2, 2)  # half a gigabyte, far more than the L2 cache
    times = interleaved({"product": partial(torch.matmul, square, square), "copy": large.clone})
    tflop_per_s = 2 * SQUARE**3 / times["product"] / 1e9
    gb_per_s = 2 * large.nbytes / times["copy"] / 1e6
    for model, *sizes in LINEARS:
        free()
        yield {"model": model, **gradient_row(*sizes, tflop_per_s, gb_per_s)}


def gradient_row(tokens: int, features_in: int, features_out: int, tflop_per_s: float, gb_per_s: float) -> Row:
    grad = torch.randn(tokens, features_out, device=CUDA, dtype=torch.bfloat16)
    weight = torch.randn(features_out, features_in, device=CUDA, dtype=torch.bfloat16)
    pattern = Pattern(2, 4)
    operand = _semi_structured.pack(grad, pattern, "magnitude")

    def sparse(method: str) -> Tensor:
        return _semi_structured.multiply(_semi_structured.pack(grad, pattern, method), weight)

    input = torch.randn(tokens, features_in, device=CUDA, dtype=torch.bfloat16)

    def sparse_weight(method: str) -> Tensor:
        return _semi_structured.multiply(_semi_structured.pack(grad.t(), pattern, method), input)

    times = interleaved(
        {
            "exact": lambda: grad @ weight,
            "product alone": lambda: _semi_structured.multiply(operand, weight),
            "magnitude": lambda: sparse("magnitude"),
            "mvue": lambda: sparse("mvue"),
        }
    )
    weight_times = interleaved(
        {
            "exact": lambda: grad.t() @ input,
            **{method: partial(sparse_weight, method) for method in ("magnitude", "mvue")},
        }
    )
    flop = 2 * tokens * features_in * features_out
    moved = grad.nbytes + 2 * operand.packed.nbytes + weight.nbytes + 2 * tokens * features_in
    bound_ms = max(flop / 2 / tflop_per_s / 1e9, moved / gb_per_s / 1e6)
    return {
        "tokens": tokens,
        "in": features_in,
        "out": features_out,
        "exact_ms": round(times["exact"], 4),
        "exact_tflop_per_s": round(flop / times["exact"] / 1e9),
        "times_exact": {key: round(times["exact"] / ms, 3) for key, ms in times.items() if key != "exact"},
        "times_exact_at_the_bound": round(times["exact"] / bound_ms, 2),
        "weight_exact_ms": round(weight_times["exact"], 4),
        "weight_times_exact": {
            key: round(weight_times["exact"] / weight_times[key], 3) for key in ("magnitude", "mvue")
        },
        "gflop": round(flop / 1e9, 1),
        "mbytes": round(moved / 1e6, 1),
    }


def show_gradients(row: Row) -> str:
    ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["times_exact"].items())
    head = f"gradient | {row['model']:13s} {row['tokens']:6d} x {row['in']:5d} -> {row['out']:5d}"
    exact = f"exact {row['exact_ms']:8.3f} ms {row['exact_tflop_per_s']:4d} TFLOP/s"
    weights = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["weight_times_exact"].items())
    return f"{head} | {exact} | {ratios} (bound {row['times_exact_at_the_bound']:.2f}x) | weight: {weights}"


# train_step

Step = Callable[[], None]


def make_step(model: nn.Module, input: Tensor, target: Tensor, autocast: bool) -> Step:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            output = model(input)
            loss = F.cross_entropy(output.flatten(0, -2), target.flatten())
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def llama() -> tuple[nn.Module, Tensor, Tensor, bool]:
    model = models.Llama().to(CUDA, torch.bfloat16)
    tokens = torch.randint(256, (8, 2049), device=CUDA)
    return model, tokens[:, :-1], tokens[:, 1:], False


def llama_lora() -> tuple[nn.Module, Tensor, Tensor, bool]:
    model, input, target, autocast = llama()
    return models.with_adapters(model, rank=16).to(CUDA, torch.bfloat16), input, target, autocast


def vit() -> tuple[nn.Module, Tensor, Tensor, bool]:
    import torchvision

    images = torch.randn(64, 3, 224, 224, device=CUDA)
    return torchvision.models.vit_l_16().to(CUDA), images, torch.randint(1000, (64,), device=CUDA), True


def resnet() -> tuple[nn.Module, Tensor, Tensor, bool]:
    images = torch.randn(128, 3, 224, 224, device=CUDA).to(memory_format=torch.channels_last)
    model = models.resnet50().to(CUDA, memory_format=torch.channels_last)
    return model, images, torch.randint(1000, (128,), device=CUDA), True


MODELS = {"Llama, 4 blocks": llama, "Llama + LoRA": llama_lora, "ViT-L": vit, "ResNet-50": resnet}


def train_step() -> Iterator[Row]:
    for name, make in MODELS.items():
        free()
        torch.manual_seed(0)
        yield {"model": name, **step_row(*make())}


def step_row(model: nn.Module, input: Tensor, target: Tensor, autocast: bool) -> Row:
    narrow = {f"{at}.narrow" for at, layer in model.named_modules() if isinstance(layer, models.Adapter)}
    narrow |= {f"{at}.widen" for at, layer in model.named_modules() if isinstance(layer, models.Adapter)}
    twins = {"plain": model}
    for backend in ("sparse", "auto"):
        twins[backend] = sdgp.convert(
            copy.deepcopy(model), "2:4", backend=backend, filter=lambda layer, at: at not in narrow
        )
    steps = {key: make_step(twin, input, target, autocast) for key, twin in twins.items()}
    peaks = {}
    for key, step in steps.items():
        step()  # auto measures here
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peaks[key] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    times = interleaved(steps)
    layers = [row for row in sdgp.report(twins["auto"]) if row.pattern]
    return {
        "plain_ms": round(times["plain"], 3),
        "saved": {key: round(1 - times[key] / times["plain"], 4) for key in ("sparse", "auto")},
        "layers": len(layers),
        "layers_sparse": sum(row.product == "sparse" for row in layers),
        "peak_mib_above_start": peaks,
    }


def show_train_step(row: Row) -> str:
    saved = "  ".join(f"{key} {share:+.1%}" for key, share in row["saved"].items())
    peaks = "  ".join(f"{key} {mib}" for key, mib in row["peak_mib_above_start"].items())
    head = f"step     | {row['model']:15s} | plain {row['plain_ms']:8.2f} ms | saved: {saved}"
    return f"{head} | auto sparse in {row['layers_sparse']} of {row['layers']} | peak MiB: {peaks}"


# The report

SUBJECTS: dict[str, tuple[Callable[[], Iterator[Row]], Callable[[Row], str]]] = {
    "pack": (pack, show_pack),
    "gradients": (gradients, show_gradients),
    "train_step": (train_step, show_train_step),
    "prune_nm": (lambda: prune_nm(256), show_prune_nm),
}


def measure(subject: str, clock: Clock) -> tuple[list[Row], bool]:
    """Returns the rows of a subject, and whether an error ended it."""
    rows, failed, show = [], False, SUBJECTS[subject][1]
    try:
        for row in SUBJECTS[subject][0]():
            rows.append(row)
            print(show(row), flush=True)
            clock.check()
    except OutOfTime:
        print(f"{subject}: out of time after {len(rows)} rows", flush=True)
    except (RuntimeError, ImportError) as error:  # continue with the next subject
        print(f"{subject}: stopped after {len(rows)} rows: {error}", flush=True)
        failed = True
    free()
    return rows, failed


def write_markdown(name: str) -> None:
    """Writes all stored results, also those of earlier calls, as NAME.md."""
    stored = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    where = next(iter(stored.values()))["machine"]
    parts = [f"# sdgp on {where['gpu']}\n\n" + ", ".join(f"{key} {value}" for key, value in where.items()) + "\n"]
    for subject, result in stored.items():
        lines = "\n".join(SUBJECTS[subject][1](row) for row in result["rows"])
        parts.append(f"\n## {subject}\n\n```\n{lines}\n```\n")
    (RESULTS / f"{name}.md").write_text("".join(parts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--store", metavar="NAME", help="write benchmarks/results/NAME.json and NAME.md")
    args = parser.parse_args()
    clock = Clock(args.seconds)
    where = machine(ROOT, *MEASURED) | {
        "gpu": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
    }
    torch.manual_seed(0)
    failed = []
    for subject in args.subject:
        rows, stopped = measure(subject, clock)
        failed += [subject] if stopped else []
        if args.store and rows:
            store(subject, where, rows, args.store)
            write_markdown(args.store)
    if failed:
        raise SystemExit(f"gpu: stopped early: {', '.join(failed)}")


if __name__ == "__main__":
    main()
