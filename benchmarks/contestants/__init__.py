"""Those who take part: ours, and each peer."""
