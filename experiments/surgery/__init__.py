"""Changes of a trained model: what is left of it, and what it costs."""
