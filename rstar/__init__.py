"""rstar: self-evolving math reasoning for small language models."""
