# SPDX-License-Identifier: BSD-3-Clause
"""The measurements of gpu_report.py. Each subject prints its rows while it runs, and is stored when it ends.

    prune_nm       GB/s read and written, compared with clone()
    pack           prune and pack to 2:4, compared with clone(), PyTorch's compressor and its 4 x 4 tile kernel
    gradients      both sparse products of a linear layer, packing included, compared with the exact ones
    float8         the same for the data gradient of torchao's float8 layer, compiled; needs torchao
    train_step     whole steps: plain, sparse forced, auto; and their peak memory

Each result is the median of 11 rounds; every round runs all candidates. The bounds next to the measurements assume the
bandwidth of a large copy, and the rate of a large dense product, doubled where two of four values are skipped.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import models
import torch
import torchvision
from bench import MEASURED, ROOT, Row, store
from gpu_lines import LINES, write_markdown
from prune_nm import PATTERNS
from torch import Tensor, nn

import sdgp
from sdgp import Pattern, _semi_structured
from sdgp._machine import machine
from sdgp._ops import pack_24
from sdgp._pattern import methods_on
from sdgp._timing import training_step

ROUNDS = 11
METHODS = methods_on("cuda")
TURN_MS = 2.0  # milliseconds of work between two readings of the clock
CUDA = torch.device("cuda")
PACKED = (16384, 8192)  # 256 MiB of 16-bit values
SQUARE = 8192  # the side of the product that shows what the GPU can do


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

FLOAT8_MODELS = ("Llama-3-8B", "Llama-13B", "Llama-70B")


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
    input = torch.randn(tokens, features_in, device=CUDA, dtype=torch.bfloat16)
    pattern = Pattern(2, 4)
    operand = _semi_structured.pack(grad, pattern, "magnitude")

    def sparse(method: str) -> Tensor:
        return _semi_structured.multiply(_semi_structured.pack(grad, pattern, method), weight)

    def sparse_weight(method: str) -> Tensor:
        return _semi_structured.multiply(_semi_structured.pack(grad.t(), pattern, method), input)

    methods = ("magnitude", "mvue")
    candidates = {"exact": lambda: grad @ weight, "product alone": lambda: _semi_structured.multiply(operand, weight)}
    times = interleaved(candidates | {method: partial(sparse, method) for method in methods})
    weight_candidates = {"exact": lambda: grad.t() @ input}
    weight_times = interleaved(weight_candidates | {method: partial(sparse_weight, method) for method in methods})
    flop = 2 * tokens * features_in * features_out
    moved = grad.nbytes + 2 * operand.packed.nbytes + weight.nbytes + 2 * tokens * features_in
    bound_ms = max(flop / 2 / tflop_per_s / 1e9, moved / gb_per_s / 1e6)
    return {
        "tokens": tokens,
        "in": features_in,
        "out": features_out,
        "exact_ms": round(times["exact"], 4),
        "exact_tflop_per_s": round(flop / times["exact"] / 1e9),
        "times_exact": times_exact(times),
        "times_exact_at_the_bound": round(times["exact"] / bound_ms, 2),
        "weight_exact_ms": round(weight_times["exact"], 4),
        "weight_times_exact": times_exact(weight_times),
        "gflop": round(flop / 1e9, 1),
        "mbytes": round(moved / 1e6, 1),
    }


def times_exact(times: dict[str, float]) -> dict[str, float]:
    return {key: round(times["exact"] / ms, 3) for key, ms in times.items() if key != "exact"}


# float8


def float8() -> Iterator[Row]:
    for model, *sizes in LINEARS:
        if model in FLOAT8_MODELS:
            free()
            yield {"model": model, **float8_row(*sizes)}


def float8_row(tokens: int, features_in: int, features_out: int) -> Row:
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    linear = nn.Linear(features_in, features_out, bias=False, device=CUDA, dtype=torch.bfloat16)
    layer = sdgp.convert(Float8Linear.from_float(linear, Float8LinearConfig()), "2:4", backend="pruned")
    factors = torch.randn(tokens, features_out, device=CUDA, dtype=torch.bfloat16), linear.weight.detach()
    products = {
        "bfloat16": torch.matmul,
        "exact": float8_product(layer, "exact", "mvue"),
        "magnitude": float8_product(layer, "sparse", "magnitude"),
        "mvue": float8_product(layer, "sparse", "mvue"),
    }
    times = interleaved({name: partial(product, *factors) for name, product in products.items()})
    return {
        "tokens": tokens,
        "in": features_in,
        "out": features_out,
        "exact_ms": round(times["exact"], 4),
        "times_exact": times_exact(times),
    }


def float8_product(layer: Any, kind: str, method: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a compiled data gradient: torch.compile fuses the casts, without which float8 does not pay."""
    pruning = replace(layer.pruning, method=method)

    def product(grad: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = getattr(replace(layer.products(grad, grad, weight), pruning=pruning), kind)()
        return result

    return torch.compile(product)


# train_step


def llama() -> tuple[nn.Module, Tensor, Tensor, bool]:
    model = models.Llama().to(CUDA, torch.bfloat16)
    tokens = torch.randint(256, (8, 2049), device=CUDA)
    return model, tokens[:, :-1], tokens[:, 1:], False


def llama_lora() -> tuple[nn.Module, Tensor, Tensor, bool]:
    model, input, target, autocast = llama()
    return models.with_adapters(model, rank=16).to(CUDA, torch.bfloat16), input, target, autocast


def vit() -> tuple[nn.Module, Tensor, Tensor, bool]:
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
    def pruned(layer: nn.Module, at: str) -> bool:
        return not at.endswith((".narrow", ".widen"))  # the small matrices of an adapter

    twins = {"plain": model}
    for backend in ("sparse", "auto"):
        twins[backend] = sdgp.convert(copy.deepcopy(model), "2:4", backend=backend, filter=pruned)
    dtype = torch.bfloat16 if autocast else None
    steps = {key: training_step(twin, input, target, dtype) for key, twin in twins.items()}
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


# All subjects, the most important ones first

SUBJECTS: dict[str, Callable[[], Iterator[Row]]] = {
    "pack": pack,
    "gradients": gradients,
    "float8": float8,
    "train_step": train_step,
    "prune_nm": partial(prune_nm, 256),
}


def measure(subject: str, end: float) -> tuple[list[Row], bool]:
    """Returns the rows of a subject that were measured before ``time.monotonic()`` is ``end``, and whether an error
    ended it."""
    rows, failed = [], False
    try:
        for row in SUBJECTS[subject]():
            rows.append(row)
            print(LINES[subject](row), flush=True)
            if time.monotonic() > end:
                print(f"{subject}: out of time after {len(rows)} rows", flush=True)
                break
    except (RuntimeError, ImportError) as error:  # continue with the next subject
        print(f"{subject}: stopped after {len(rows)} rows: {error}", flush=True)
        failed = True
    free()
    return rows, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--store", metavar="NAME", help="write benchmarks/results/NAME.json and NAME.md")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    where = machine(ROOT, *MEASURED) | {
        "gpu": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
    }
    torch.manual_seed(0)
    failed = []
    for subject in args.subject:
        rows, stopped = measure(subject, end)
        failed += [subject] if stopped else []
        if args.store and rows:
            store(subject, where, rows, args.store)
            write_markdown(args.store)
    if failed:
        raise SystemExit(f"gpu: stopped early: {', '.join(failed)}")


if __name__ == "__main__":
    main()
