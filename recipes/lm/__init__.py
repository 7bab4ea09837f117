# SPDX-License-Identifier: BSD-3-Clause
"""Recipes for language models: a GPT from scratch, LoRA fine-tuning, and a classifier of text."""
