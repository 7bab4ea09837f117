# SPDX-License-Identifier: BSD-3-Clause
"""Packs folders of images into ffcv files, as the published ImageNet runs used them: train/ into train.beton etc.

    python -m recipes.pack SOURCE DESTINATION                         # (448, 0.60, 90), 229 GB for ImageNet
    python -m recipes.pack SOURCE DESTINATION --jpeg-share 0          # raw pixels: CIFAR-10

This needs ffcv: install libturbojpeg, the headers of OpenCV and pkg-config on the system, then pip install ffcv.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from torchvision.datasets import ImageFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with train/ and val/ (or test/), each of class folders")
    parser.add_argument("destination", type=Path)
    parser.add_argument("--max-resolution", type=int, default=448, help="pixels of the longer side, at most")
    parser.add_argument(
        "--jpeg-share", type=float, default=0.6, help="images that are kept as JPEG; the rest are pixels"
    )
    parser.add_argument("--quality", type=int, default=90, help="quality of those JPEGs")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    try:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter
    except ImportError as error:
        sys.exit(f"pack: expected ffcv to be installed (pip install ffcv): {error}")
    parts = sorted(path for path in args.source.iterdir() if path.is_dir()) if args.source.is_dir() else []
    if not parts:
        sys.exit(f"pack: expected a folder with train/ and val/, got {args.source}")
    args.destination.mkdir(parents=True, exist_ok=True)
    for part in parts:
        target = args.destination / f"{part.name}.beton"
        temporary = target.with_name(target.name + ".tmp")
        image = RGBImageField(
            write_mode="proportion" if args.jpeg_share > 0 else "raw",
            max_resolution=args.max_resolution,
            compress_probability=args.jpeg_share,
            jpeg_quality=args.quality,
        )
        print(f"{part} -> {target}", flush=True)
        writer = DatasetWriter(str(temporary), {"image": image, "label": IntField()}, num_workers=args.workers)
        writer.from_indexed_dataset(ImageFolder(str(part)))  # shows its own progress
        temporary.replace(target)  # so a file with this name is always complete


if __name__ == "__main__":
    main()
