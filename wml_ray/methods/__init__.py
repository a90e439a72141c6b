"""What peers learn from: losses, the weight gradient, and one file a method."""
