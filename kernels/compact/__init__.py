"""compact: move the survivors of an eviction together."""
