# SPDX-License-Identifier: BSD-3-Clause
"""Callbacks for trainers of other libraries, each in a module that imports its library: import the one you need."""
