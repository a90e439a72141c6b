"""Methods: the losses peers are trained with, one file a method. Importing the package imports no torch."""
