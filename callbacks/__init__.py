"""What a Trainer plugs in; the mathematics lives in lit_parallel."""
