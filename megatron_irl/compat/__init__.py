"""What makes up for upstream: a file a matter, with its reason and when it can go."""
