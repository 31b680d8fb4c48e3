"""torch.fx plumbing: capture, call signatures, typed node metadata, editing and serialization."""
