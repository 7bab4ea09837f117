# SPDX-License-Identifier: BSD-3-Clause
"""Training recipes: one command, one row of recipes/README.md. Not part of the installed package."""
