# SPDX-License-Identifier: BSD-3-Clause
"""Training recipes. One command reproduces one row of recipes/README.md. The package is not installed with sdgp."""
