"""``upscale reproduce``: the accuracy table. Masks, exports, verifies, evaluates and times each combination of network,
importance, amount, side and method (Wan et al. 2023, arXiv 2307.08771, section 4.1)."""
