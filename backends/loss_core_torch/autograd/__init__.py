"""The losses as autograd functions, one a family: terms forward, a gradient from coefficients backward."""
