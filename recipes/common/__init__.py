# SPDX-License-Identifier: BSD-3-Clause
"""Code that the recipes share: configs, checkpoints, processes, bookkeeping. Each recipe has its own training loop."""
