"""One module per table or figure of the papers; how to add one is in `experiments/spec.py`."""
