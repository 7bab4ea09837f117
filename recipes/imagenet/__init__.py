# SPDX-License-Identifier: BSD-3-Clause
"""The recipe for the published ImageNet rows."""
