"""Measured side by side: this program and its peers, on the same servers, settings and data. See docs/performance.md."""
