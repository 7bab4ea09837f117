# SPDX-License-Identifier: BSD-3-Clause
"""A study of whether pruning reaches the same result in less time than a shorter plain run or a smaller batch."""
