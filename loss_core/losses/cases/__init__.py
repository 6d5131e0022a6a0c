"""How inputs are drawn: what is special about a case, and the arrays of it."""
