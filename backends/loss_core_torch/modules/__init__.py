"""The losses as torch modules: checks, an autograd function, and the reduction over [T]."""
