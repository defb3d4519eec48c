"""Recipes: YAML files and overrides, merged into plain data and bound to factories. Imports no torch."""
