"""Affinities, balance and numbers of experts around DeepSeek-V3 (arXiv 2412.19437)."""
