"""Pure quantization arithmetic: no graphs, no modules, no state."""
