"""Examples that run in seconds: ``python -m examples.finetune_masked`` and the like, from the root of the checkout."""
