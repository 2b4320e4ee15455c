"""The pieces of `train_lm.py`: text, model, losses, one training run, report."""
