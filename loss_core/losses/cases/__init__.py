"""Test cases: recipes, and how the arrays of a case are drawn."""
