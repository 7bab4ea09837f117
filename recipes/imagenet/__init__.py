# SPDX-License-Identifier: BSD-3-Clause
"""The published ImageNet rows."""
