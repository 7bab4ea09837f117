# SPDX-License-Identifier: BSD-3-Clause
"""What the recipes share: configs, checkpoints, processes, a run's bookkeeping. How to train stands in each recipe."""
