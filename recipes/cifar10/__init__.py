# SPDX-License-Identifier: BSD-3-Clause
"""The published CIFAR-10 rows."""
