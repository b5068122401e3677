"""rkv: importance and redundancy of the tokens of a paged cache, apart (docs/method.md)."""
