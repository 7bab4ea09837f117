# SPDX-License-Identifier: BSD-3-Clause
"""The recipe for the published CIFAR-10 rows."""
