"""Laws of the loss: granularity, and compute as the measure of a difference."""
