# SPDX-License-Identifier: Apache-2.0
"""The pieces of `train_lm.py`: text, model, losses, one training run, report."""
