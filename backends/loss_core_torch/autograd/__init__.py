"""The losses as autograd functions: terms in the forward, a gradient from coefficients in the backward."""
