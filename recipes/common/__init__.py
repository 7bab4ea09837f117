# SPDX-License-Identifier: BSD-3-Clause
"""Code that the recipes share: configs, checkpoints, processes, bookkeeping, and the training loop."""
