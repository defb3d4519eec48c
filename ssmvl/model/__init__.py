"""The vision-language model: built from a recipe, loaded, saved, and its costs."""
