"""UNets in plain PyTorch, in the style of well-known code bases: neither diffusers nor configs."""
