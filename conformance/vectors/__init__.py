"""Golden vectors: the contract as files, for ports that are not PyTorch (docs/vectors.md)."""
