"""Vision-language model: building it from a recipe, loading, saving, and its costs."""
