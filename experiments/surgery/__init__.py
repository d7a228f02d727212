"""Changes of a trained model: what they cost, and what they keep."""
