"""Graph passes: the ordered PREPARE, CONVERT and LOWER tables."""
