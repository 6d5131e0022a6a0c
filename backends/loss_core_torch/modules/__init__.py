"""The losses as torch modules: checks of arguments, an autograd function, and the reduction over tokens."""
