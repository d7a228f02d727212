"""Group limits and dropping of DeepSeek-V2 (arXiv 2405.04434)."""
