# SPDX-License-Identifier: BSD-3-Clause
"""Callbacks for the trainers of other libraries. Each module imports its library, so import only the one you need."""
