"""The target's side: copying parts, building indexes, decoding segments, applying them with their checkpoint."""
