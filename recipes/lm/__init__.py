# SPDX-License-Identifier: BSD-3-Clause
"""Language models: a GPT from scratch, LoRA fine-tuning."""
