# SPDX-License-Identifier: BSD-3-Clause
"""Recipes for language models: a GPT from scratch, and LoRA fine-tuning, and a text classifier."""
