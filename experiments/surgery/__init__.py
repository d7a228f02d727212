"""Changes of trained models, and how good what comes out is."""
