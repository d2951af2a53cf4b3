"""Models of other programs in and out, and what a path given by the user is."""
