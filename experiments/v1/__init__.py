"""Tables and figures of DeepSeekMoE (arXiv 2401.06066)."""
