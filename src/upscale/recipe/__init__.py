"""What travels with a pruned model so that it can be made again: plan, example call, and the graph in words."""

from .model import Recipe, Step, attach_recipe, make_recipe, parse_recipe, recipe_text

__all__ = ["Recipe", "Step", "attach_recipe", "make_recipe", "parse_recipe", "recipe_text"]
